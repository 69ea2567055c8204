// Runs before the first draw, so that neither the theme nor the language changes in view.
(() => {
  const read = (key) => { try { return localStorage.getItem("xverse." + key); } catch { return null; } };
  const theme = read("theme");
  const dark = theme === "dark" || (theme !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  if (innerWidth > 800 && read("sidebar") !== "hidden") document.documentElement.dataset.sidebar = "shown";
})();
