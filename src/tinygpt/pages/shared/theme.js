// Light, dark, or what the system says. Not a module: it runs before the page is painted.
{
  const KEY = "tinygpt-theme";
  const NAMES = { auto: "Auto", light: "Light", dark: "Dark" };
  const { dataset } = document.documentElement;

  /** Reading or keeping the choice; where storage is switched off it lasts as long as the page. */
  const trying = (action) => {
    try {
      return action();
    } catch {
      return null;
    }
  };

  const apply = (theme) => {
    dataset.theme = theme in NAMES ? theme : "auto";
    for (const button of document.querySelectorAll("[data-theme-switch]")) {
      button.textContent = NAMES[dataset.theme];
      button.setAttribute("aria-label", `Theme: ${button.textContent}`);
    }
    document.dispatchEvent(new Event("themechange"));
  };

  apply(trying(() => localStorage.getItem(KEY)));
  document.addEventListener("DOMContentLoaded", () => apply(dataset.theme));
  document.addEventListener("click", ({ target }) => {
    if (!target.closest("[data-theme-switch]")) return;
    const order = Object.keys(NAMES);
    apply(order[(order.indexOf(dataset.theme) + 1) % order.length]);
    trying(() => localStorage.setItem(KEY, dataset.theme));
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => apply(dataset.theme));
}
