// Tabs as screen readers know them: arrows move between them, and the panel follows.

import { byId, moveWithArrows } from "../shared/dom.js";

export class Tabs {
  /** ``onShow(id)`` is called with the id of a panel whenever it comes up. */
  constructor(list, onShow) {
    this.tabs = [...list.querySelectorAll("[role=tab]")];
    this.onShow = onShow;
    for (const tab of this.tabs) tab.addEventListener("click", () => this.open(panelOf(tab)));
    list.addEventListener("keydown", (event) =>
      moveWithArrows(event, this.#shown, (to) => {
        this.#shown[to].focus();
        this.open(panelOf(this.#shown[to]));
      }),
    );
  }

  get #shown() {
    return this.tabs.filter((tab) => !tab.hidden);
  }

  get current() {
    return panelOf(this.tabs.find((tab) => tab.getAttribute("aria-selected") === "true"));
  }

  open(id) {
    for (const tab of this.tabs) {
      const is = panelOf(tab) === id;
      tab.setAttribute("aria-selected", is);
      tab.tabIndex = is ? 0 : -1;
      byId(panelOf(tab)).hidden = !is;
    }
    this.onShow(id);
  }
}

const panelOf = (tab) => tab.getAttribute("aria-controls");
