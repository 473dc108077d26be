// What is seen and pressed. The model is in a worker; this side shows what it says. Every text, be
// it the model's, the run's or the visitor's, is put in as text, never as HTML.

import { LABELS, drawCurves, isCurve } from './curve.mjs';
import { History, historyKey } from './history.mjs';

const find = (id) => document.getElementById(id);

// Starting -----------------------------------------------------------------------------------------

// Whatever keeps the page from starting is said, the first reason of all, instead of "Loading".
let state = 'loading'; // then 'ready' or 'failed'
function failStart(reason) {
  if (state !== 'loading') return;
  state = 'failed';
  find('loading').hidden = true;
  fail(`The model could not be started: ${reason}`);
}
find('unstarted').remove(); // what the page says where no script runs
find('loading').hidden = false;
addEventListener('error', ({ message }) => failStart(message || 'a script of the page failed.'));
addEventListener('unhandledrejection', ({ reason }) => failStart(reason?.message ?? String(reason)));
document.addEventListener('securitypolicyviolation', ({ effectiveDirective: what }) =>
  failStart(
    `the server of this page, or the browser, forbids what it needs (${what}). Save the file and open it from your disk.`,
  ),
);
if (!globalThis.WebAssembly || !globalThis.Worker) {
  const lacking = globalThis.WebAssembly ? 'workers' : 'WebAssembly';
  failStart(
    `this browser has no ${lacking}, or has them switched off, as Safari's lockdown mode does. A current Firefox, Chrome, Edge or Safari has them.`,
  );
}

const about = JSON.parse(find('about').textContent);
const text = find('text');
const SHARED = ['count', 'temperature', 'topK', 'topP', 'seed'];

find('ends').hidden = !about.tokenizer.ends;

// Loading ------------------------------------------------------------------------------------------

const worker = new Worker(
  URL.createObjectURL(new Blob([JSON.parse(find('worker').textContent)], { type: 'text/javascript' })),
);
const module = bytesOf(find('module').textContent);
const { config, tokenizer, shaders } = about;
worker.postMessage({ type: 'start', module, config, tokenizer, shaders });

function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const characters = atob(base64);
  const bytes = new Uint8Array(characters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
  return bytes;
}

// Weights arrive as elements while the file is read; each goes to the worker and is forgotten.
let loaded = 0;
function take(element) {
  const { kind, at, columns } = element.dataset;
  const bytes = bytesOf(element.textContent);
  const chunk = { kind, at: Number(at), columns: Number(columns) };
  worker.postMessage({ type: 'weights', chunk, bytes }, [bytes.buffer]);
  element.remove();
  find('progress').value = ++loaded / about.chunks;
  if (loaded === about.chunks) worker.postMessage({ type: 'loaded' });
}

// An element may be seen before all of its text is there; it is whole once another one follows it.
const takeWhole = () => {
  for (const element of document.querySelectorAll('script.weights')) {
    if (element.nextElementSibling || document.readyState !== 'loading') take(element);
  }
};
const watching = new MutationObserver(takeWhole);
watching.observe(document.body, { childList: true });
document.addEventListener('DOMContentLoaded', () => {
  watching.disconnect();
  takeWhole();
  if (loaded !== about.chunks) {
    failStart('this file is not whole: weights are missing at its end. Fetch it again.');
  }
});

// Writing ------------------------------------------------------------------------------------------

const steps = new History(); // of { text, written }
let seen = ''; // the text before the next key
let written = null; // what was written last: { prompt, values, text }, to be linked to
let before = null; // the state before what is being written, until anything of it is there
let writing = false;
let ready = false;

const present = () => ({ text: seen, written });

function setText(whole) {
  text.value = seen = whole;
}

function options() {
  const given = {};
  for (const name of SHARED) {
    const field = find(name);
    const value = Number(field.value);
    if (field.value === '' || !Number.isFinite(value) || !field.checkValidity()) {
      find('settings').open = true;
      field.focus();
      throw new Error(`${field.labels[0].textContent}: wanted a number from ${field.min} to ${field.max}.`);
    }
    given[name] = value;
  }
  given.ignoreEos = find('ignoreEos').checked;
  return given;
}

function write(message = { type: 'generate', text: text.value }) {
  if (writing || !ready) return;
  if (find('fresh').checked) find('seed').value = crypto.getRandomValues(new Uint32Array(1))[0];
  try {
    const given = options();
    worker.postMessage({ ...message, options: given });
    before = present();
    written = { prompt: text.value, values: given };
  } catch (error) {
    return fail(error.message);
  }
  fail('');
  setWriting(true);
  find('status').textContent = 'writing';
  if (find('look').open) showTokens([]); // those of the text before
}

function setWriting(now) {
  writing = now;
  text.readOnly = now;
  text.setAttribute('aria-busy', now);
  find('stop').disabled = !now;
  setButtons();
}

function setButtons() {
  find('go').disabled = find('share').disabled = writing || !ready;
  find('undo').disabled = writing || !steps.canUndo;
  find('redo').disabled = writing || !steps.canRedo;
}

// The first of what is written makes a step that can be undone; before it nothing has happened.
function begun() {
  if (before) steps.keep(before);
  before = null;
}

function goTo(state, told) {
  if (!state) return;
  setText(state.text);
  written = state.written;
  fail('');
  find('status').textContent = told;
  setButtons();
  keepSoon();
  if (find('look').open) askForTokens();
}

const undo = () => writing || goTo(steps.back(present()), 'undone');
const redo = () => writing || goTo(steps.forward(present()), 'done again');

function fail(message) {
  find('error').textContent = message;
  find('error').hidden = !message;
}

// To lay out a long text takes longer than the model takes to write the next piece of it. So the page
// shows what is written in turns, and rests between two of them: otherwise Stop could not be reached.
const REST = 3; // times as long as it took to show the last one
let effort = 0; // milliseconds which that took
let unshown = null; // the text as it is by now, where the page shows less of it
function show() {
  if (unshown === null) return;
  const began = performance.now();
  const atEnd = text.scrollHeight - text.scrollTop - text.clientHeight < 40;
  setText(unshown);
  unshown = null;
  const height = text.scrollHeight; // asking makes the browser lay it out now
  if (atEnd) text.scrollTop = height;
  effort = performance.now() - began;
}

const heard = {
  ready({ where }) {
    if (state === 'failed') return;
    state = 'ready';
    find('card').append(element('dt', 'Runs on'), element('dd', `your ${where}`));
    find('loading').hidden = true;
    ready = true;
    setWriting(false);
    document.documentElement.dataset.ready = Math.round(performance.now());
    const prompt = readLink();
    if (prompt !== null && !kept) writeFrom(prompt); // after a reload what became of it is there
    else if (find('look').open) askForTokens();
  },
  branched({ text: whole }) {
    begun();
    written.prompt = whole;
    setText(whole);
  },
  written({ drop, text: added }) {
    begun();
    document.documentElement.dataset.first ??= Math.round(performance.now());
    if (unshown === null) {
      unshown = text.value;
      setTimeout(() => requestAnimationFrame(show), REST * effort);
    }
    unshown = unshown.slice(0, unshown.length - drop) + added;
  },
  done({ count, ended, seconds, error }) {
    if (state !== 'ready') return failStart(error);
    show();
    if (writing) written = { ...written, count, text: text.value };
    before = null;
    setWriting(false);
    keepSoon();
    fail(error ?? '');
    const pace = count > 1 ? `, ${Math.round(count / seconds).toLocaleString('en')} per second` : '';
    const end = ended ? '; the text ends here' : '';
    find('status').textContent = error ? '' : `${counted(count, 'token')}${pace}${end}`;
    document.documentElement.dataset.pace = count / seconds;
    if (find('look').open) askForTokens();
  },
  tokens: ({ tokens }) => showTokens(tokens),
  candidates: (message) => showCandidates(message),
};
worker.onmessage = ({ data }) => heard[data.type](data);
worker.onerror = ({ message }) => failStart(message || 'the browser starts no worker for this page.');

find('go').onclick = () => write();
find('stop').onclick = () => worker.postMessage({ type: 'stop' });
find('undo').onclick = undo;
find('redo').onclick = redo;
document.addEventListener('keydown', (event) => {
  const what = event.target.matches('input') ? undefined : historyKey(event); // fields have their own
  if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) write();
  if (event.key === 'Escape' && writing) worker.postMessage({ type: 'stop' });
  if (!what) return;
  event.preventDefault();
  ({ undo, redo })[what]();
});
text.addEventListener('beforeinput', (event) => {
  const what = { historyUndo: undo, historyRedo: redo }[event.inputType];
  if (!what) return;
  event.preventDefault();
  what();
});
text.oninput = () => {
  steps.keepBeforeTyping(present());
  seen = text.value;
  find('status').textContent = '';
  setButtons();
  keepSoon();
  if (find('look').open) askForTokens();
};

// Keeping ------------------------------------------------------------------------------------------

// The text outlives a reload and the way back: it is kept in the tab, if that may keep anything. It
// belongs to a page and its link: another link is another text.
const KEPT = `tinygpt-page ${location.pathname}`;
const kept = readKept();
let keeping = 0;

function keep() {
  try {
    sessionStorage.setItem(KEPT, JSON.stringify({ link: location.hash, text: unshown ?? text.value, written }));
  } catch {
    // switched off, or too long: the text lasts as long as the page
  }
}

function keepSoon() {
  clearTimeout(keeping);
  keeping = setTimeout(keep, 300);
}

function readKept() {
  try {
    const found = JSON.parse(sessionStorage.getItem(KEPT));
    if (found?.link !== location.hash || !(found.text || found.written)) return null;
    written = found.written;
    setText(found.text);
    return found;
  } catch {
    return null;
  }
}

addEventListener('pagehide', keep);
document.addEventListener('visibilitychange', () => document.hidden && keep());

// Links --------------------------------------------------------------------------------------------

find('share').onclick = async () => {
  const now = Object.fromEntries(SHARED.map((name) => [name, find(name).value]));
  // as long as nothing was changed since, the link writes the same again
  const same = written?.text === text.value && written.count > 0;
  const from = same ? written : { prompt: text.value, values: now };
  const values = SHARED.map((name) => [name, from.values[name]]);
  const link = new URL(location.href);
  link.hash = new URLSearchParams([['prompt', from.prompt], ...values]).toString();
  history.replaceState(null, '', link);
  keep();
  try {
    await navigator.clipboard.writeText(link.href);
    find('status').textContent = 'link copied';
  } catch {
    find('status').textContent = 'the link is in the address bar';
  }
};

// A link carries a prompt, a seed and the settings, behind the # that no server ever sees. Takes over
// the settings; -> the prompt, or null.
function readLink() {
  const given = new URLSearchParams(location.hash.slice(1));
  if (!given.has('prompt')) return null;
  for (const name of SHARED) {
    if (given.has(name) && given.get(name).trim() !== '' && Number.isFinite(Number(given.get(name)))) {
      find(name).value = given.get(name);
    }
  }
  find('fresh').checked = false;
  return given.get('prompt');
}

function writeFrom(prompt) {
  if (text.value && text.value !== prompt) steps.keep(present());
  setText(prompt);
  write();
}

// Another link in the same tab loads nothing anew.
addEventListener('hashchange', () => {
  const prompt = writing || !ready ? null : readLink();
  if (prompt !== null) writeFrom(prompt);
});

// Tokens and their alternatives --------------------------------------------------------------------

const SHOWN = 500; // tokens, the last ones

function askForTokens() {
  if (writing) showTokens([]);
  if (writing || !ready) return;
  find('candidates').replaceChildren();
  worker.postMessage({ type: 'tokens', text: text.value });
}

find('look').ontoggle = () => {
  if (find('look').open) askForTokens();
};

function showTokens(tokens) {
  const shownFrom = Math.max(0, tokens.length - SHOWN);
  const buttons = tokens.slice(shownFrom).map((token, i) => {
    const button = element('button', visible(token));
    button.type = 'button';
    button.setAttribute('aria-pressed', 'false');
    button.disabled = shownFrom + i === 0;
    if (button.disabled) button.title = 'Nothing stands before the first token.';
    button.onclick = () => {
      for (const other of buttons) other.setAttribute('aria-pressed', String(other === button));
      worker.postMessage({ type: 'candidates', index: shownFrom + i });
    };
    return button;
  });
  find('tokens').replaceChildren(...buttons);
  find('candidates').replaceChildren();
  const last = shownFrom ? `The last ${SHOWN} tokens of the text. ` : 'The text as the tokenizer cuts it. ';
  find('hint').textContent = writing
    ? 'The model is writing; its tokens come when it has stopped.'
    : `${last}Choose one to see what else might have come.`;
}

function showCandidates({ index, chosen, list }) {
  const table = element('table');
  table.append(element('caption', 'What the model held likely here. Choose one to go on from it.'));
  for (const { id, p, text: token } of list) {
    const row = table.insertRow();
    const head = element('th');
    head.scope = 'row';
    const button = element('button', visible(token));
    button.type = 'button';
    button.onclick = () => write({ type: 'branch', index, id });
    if (id === chosen) button.append(element('span', ' (here)'));
    head.append(button);
    row.append(head);
    const meter = element('meter');
    meter.value = p;
    meter.setAttribute('aria-label', `${(100 * p).toFixed(1)} percent`);
    const bar = row.insertCell();
    bar.className = 'bar-cell';
    bar.append(meter);
    const number = row.insertCell();
    number.className = 'number';
    number.textContent = `${(100 * p).toFixed(1)} %`;
  }
  find('candidates').replaceChildren(table);
}

// Spaces and controls as signs, so that there is something to see.
function visible(token) {
  const signs = { ' ': '␣', '\n': '↵', '\t': '⇥', '\r': '␍' };
  return token.replace(/^\s+|\s+$|[\n\t\r]/g, (spaces) => Array.from(spaces, (c) => signs[c] ?? c).join(''));
}

const counted = (n, noun) => `${n.toLocaleString('en')} ${noun}${n === 1 ? '' : 's'}`;

function element(name, content = '') {
  const made = document.createElement(name);
  made.textContent = content;
  return made;
}

// About --------------------------------------------------------------------------------------------

function showCard({ card, weights, parity }) {
  const number = (n) => n.toLocaleString('en', { maximumFractionDigits: 4 });
  const shape = `${config.n_layer} layers, ${config.n_head} heads, ${config.n_embd} wide`;
  const rows = [
    ['Trained on', card.data],
    ['Steps', card.steps && number(card.steps)],
    ['Best validation loss', card.val_loss && number(card.val_loss)],
    ['Parameters', card.parameters && number(card.parameters)],
    ['Shape', `${shape}; sees ${number(config.block_size)} tokens at a time`],
    ['Vocabulary', `${number(config.vocab_size)} tokens (${about.tokenizer.kind})`],
    ['Weights', `${weights}; with these the logits here are within ${parity.toExponential(0)} of TinyGPT's`],
  ];
  for (const [name, value] of rows) {
    if (value) find('card').append(element('dt', name), element('dd', value));
  }
  if (!Object.values(card.curves ?? {}).some(isCurve)) return;
  find('curve').append(drawCurves(card.curves));
  const legend = element('ul');
  legend.className = 'legend';
  for (const [name, points] of Object.entries(card.curves)) {
    if (!isCurve(points)) continue;
    const item = element('li', LABELS[name]);
    item.className = name;
    legend.append(item);
  }
  find('curve').append(legend);
}

showCard(about);
