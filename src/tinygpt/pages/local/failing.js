// Says why the page cannot start, the first reason of all. It is loaded before the other modules.

import { byId } from "../shared/dom.js";

let isStarting = true;

export function started() {
  isStarting = false;
  byId("loading").hidden = true;
}

export function failStart(reason) {
  if (!isStarting) return;
  started();
  byId("error").textContent = `The model could not be started: ${reason}`;
  byId("error").hidden = false;
}

byId("unstarted").remove(); // what the page says where no script runs
byId("loading").hidden = false;
addEventListener("error", ({ message }) => failStart(message || "a script of the page failed."));
addEventListener("unhandledrejection", ({ reason }) => failStart(reason?.message ?? String(reason)));
document.addEventListener("securitypolicyviolation", ({ effectiveDirective: what }) =>
  failStart(
    `the server of this page, or the browser, forbids what it needs (${what}). Save the file and open it from your disk.`,
  ),
);
const lacking = ["WebAssembly", "Worker", "DecompressionStream"].find((name) => !globalThis[name]);
if (lacking) {
  failStart(
    `this browser has no ${lacking}, or has it switched off, as Safari's lockdown mode does. A current Firefox, Chrome, Edge or Safari has it.`,
  );
}
