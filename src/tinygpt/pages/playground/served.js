// The page of `tinygpt serve`: the playground with the server's model.

import { Playground } from "./playground.js";
import { remote } from "./remote.js";

const playground = new Playground(remote);
playground.start().catch((error) => playground.fail(error));
