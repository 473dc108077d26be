// The exported page: the playground with the model that is in the same file.

import { failStart, started } from "./failing.js";
import { local } from "./local.js";
import { Playground } from "../playground/playground.js";

new Playground(local).start().then(started, (error) => failStart(error.message));
