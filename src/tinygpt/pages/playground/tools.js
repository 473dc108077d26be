// What one can do with the text as a whole: copy it, link to it, save it, or write it by a program.

import { byId, download, h, modal } from "../shared/dom.js";

export function listenToTools(playground) {
  const { say } = playground;
  const copy = (text, said, otherwise) =>
    Promise.resolve(navigator.clipboard?.writeText(text) ?? Promise.reject()).then(() => say(said), () => say(otherwise));
  const actions = {
    copy: () => copy(playground.draft.text, "Text copied.", "The browser does not let this page copy: select the text instead."),
    share: () => {
      const { link } = playground;
      history.replaceState(null, "", link);
      playground.keep();
      copy(link.href, "Link copied.", "The link is in the address bar.");
    },
    download: () => download(playground.draft.text, "text/plain", "text.txt"),
    code: () => showCode(playground, copy),
  };
  for (const [name, action] of Object.entries(actions)) byId(name).addEventListener("click", action);
}

function showCode({ card, draft, sampling }, copy) {
  const texts = programs(card.name, draft.text || "\n", sampling.next());
  modal({ class: "programs", "aria-label": "The same as a program" },
    ...Object.entries(texts).map(([name, text]) => h("section", {},
      h("div", { class: "row" }, h("h2", {}, name), h("button", { type: "button", onclick: () => copy(text, "Copied.", "Select and copy it.") }, `Copy ${name}`)),
      h("pre", { tabindex: 0 }, text))),
    h("button", {}, "Close"));
}

/** Programs that ask the server for the next text. JSON's strings are Python's, too. */
function programs(model, prompt, settings) {
  const base = new URL("v1", location.href.split("#")[0]).href;
  const given = Object.entries({ model, prompt, ...settings }).filter(([, value]) => value !== null && value.length !== 0);
  const body = JSON.stringify(Object.fromEntries(given), null, 2).replaceAll("'", "'\\''");
  const own = ["top_k", "min_p", "repetition_penalty", "ignore_eos"]; // which OpenAI's client does not know
  const python = (value) => (value === true ? "True" : JSON.stringify(value));
  const known = given.filter(([name]) => !own.includes(name)).map(([name, value]) => `    ${name}=${python(value)},\n`);
  const more = given.filter(([name]) => own.includes(name)).map(([name, value]) => `"${name}": ${python(value)}`);
  return {
    curl: `curl ${base}/completions \\\n  -H "Authorization: Bearer $TINYGPT_API_KEY" \\\n  -H 'Content-Type: application/json' \\\n  -d '${body}'`,
    Python: `import os\nfrom openai import OpenAI\n\nkey = os.environ.get("TINYGPT_API_KEY", "none")\nclient = OpenAI(base_url=${JSON.stringify(base)}, api_key=key)\n`
      + `answer = client.completions.create(\n${known.join("")}${more.length ? `    extra_body={${more.join(", ")}},\n` : ""})\nprint(answer.choices[0].text)`,
  };
}
