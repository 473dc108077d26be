// The text and the talk outlive a reload and the way back, in the tab and nowhere else; a link carries a prompt.

import { Draft } from "./draft.js";
import { store, stored } from "../shared/storage.js";

const KEY = `tinygpt-text ${location.pathname}`;
const TALK = `tinygpt-talk ${location.pathname}`;
const OLD_NAMES = { count: "max_tokens", topK: "top_k", topP: "top_p" };

/** Keep a draft whose ids are those of ``model``, a text that tells models apart; if it is too long, its text. */
export function keepText(draft, model) {
  const link = location.hash; // another link is another text
  const forms = [{ model, link, draft }, { link, draft: new Draft([], draft.text) }];
  if (draft.isEmpty || !forms.some((form) => store(KEY, JSON.stringify(form)))) store(KEY, null);
}

/** -> { draft, model } as they were kept, or null. */
export function keptText() {
  try {
    const { draft, model, link } = JSON.parse(stored(KEY));
    return link === location.hash ? { draft: Draft.revived(draft), model } : null;
  } catch {
    return null; // nothing, or of another version of the page
  }
}

/** Keep a talk as ``keepText`` does a draft: { turns, system, question, isOpen }. */
export function keepTalk(talk, model) {
  const forms = [{ model, ...talk }, { ...talk, turns: textsOf(talk.turns) }];
  const isEmpty = !talk.turns.length && !talk.system && !talk.question;
  if (isEmpty || !forms.some((form) => store(TALK, JSON.stringify(form)))) store(TALK, null);
}

/** -> { turns, system, question, isOpen, model } as they were kept, or null. */
export function keptTalk() {
  try {
    const talk = JSON.parse(stored(TALK));
    const revived = ({ draft, ...turn }) => (draft ? { ...turn, draft: Draft.revived(draft) } : turn);
    return { ...talk, turns: talk.turns.map(revived) };
  } catch {
    return null; // nothing, or of another version of the page
  }
}

/** Turns whose answers are texts, without the ids of a model. */
export function textsOf(turns) {
  return turns.map(({ role, content, draft }) => (draft ? { role, content, draft: new Draft([], content), first: 0 } : { role, content }));
}

/** The address of this page with a prompt and settings behind the #, which no server sees. */
export function linkTo(prompt, settings) {
  const link = new URL(location.href);
  link.hash = new URLSearchParams({ prompt, ...settings }).toString();
  return link;
}

/** What the address of this page carries: { prompt, settings }, or null. */
export function readLink() {
  const { prompt, ...settings } = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  if (prompt === undefined) return null;
  const named = Object.entries(settings).map(([name, value]) => [OLD_NAMES[name] ?? name, value]);
  return { prompt, settings: Object.fromEntries(named) };
}
