// Light, dark, or whatever the system says. Not a module: it runs before the page is painted.
(() => {
  const ORDER = ["auto", "light", "dark"];
  const root = document.documentElement;

  function stored() {
    try {
      return localStorage.getItem("tinygpt-theme");
    } catch {
      return null; // storage is switched off: the choice lasts as long as the page
    }
  }

  function keep(theme) {
    try {
      localStorage.setItem("tinygpt-theme", theme);
    } catch {
      return;
    }
  }

  function apply(theme) {
    root.dataset.theme = ORDER.includes(theme) ? theme : "auto";
    for (const button of document.querySelectorAll("[data-theme-switch]")) {
      button.textContent = { auto: "Auto", light: "Light", dark: "Dark" }[root.dataset.theme];
      button.setAttribute("aria-label", `Theme: ${button.textContent}`);
    }
    document.dispatchEvent(new Event("themechange"));
  }

  apply(stored());
  document.addEventListener("DOMContentLoaded", () => {
    apply(root.dataset.theme);
    for (const button of document.querySelectorAll("[data-theme-switch]")) {
      button.addEventListener("click", () => {
        const next = ORDER[(ORDER.indexOf(root.dataset.theme) + 1) % ORDER.length];
        keep(next);
        apply(next);
      });
    }
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    document.dispatchEvent(new Event("themechange"));
  });
})();
