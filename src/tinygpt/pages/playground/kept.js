// The text outlives a reload and the way back, in the tab and nowhere else.

import { Draft } from "./draft.js";

const KEY = "tinygpt-text";

/** Keep a draft whose ids are those of ``model``, a text that tells models apart. */
export function keepText(draft, model) {
  const forms = [{ model, draft }, { draft: new Draft([], draft.text) }]; // the second is smaller
  for (const form of draft.isEmpty ? [] : forms) {
    try {
      return sessionStorage.setItem(KEY, JSON.stringify(form));
    } catch {
      // too long, or storage is switched off: then the text lasts as long as the page
    }
  }
  return forgetText();
}

/** -> { draft, model } as they were kept, or null. */
export function keptText() {
  try {
    const { draft, model } = JSON.parse(sessionStorage.getItem(KEY));
    return { draft: Draft.revived(draft), model };
  } catch {
    return null;
  }
}

function forgetText() {
  try {
    sessionStorage.removeItem(KEY);
  } catch {
    // there is none
  }
}
