// While the program writes, asks whether it is done, and then puts in what is new. Without this file the page reloads.
const now = () => document.getElementById("now");

async function look() {
  try {
    const { version } = await (await fetch("/state")).json();
    if (version !== now().dataset.version) {
      const page = new DOMParser().parseFromString(await (await fetch("/talk")).text(), "text/html");
      const log = document.getElementById("log"), other = page.getElementById("log");
      if (!other) return location.reload();
      log.append(...[...other.children].slice(log.children.length));
      now().replaceWith(page.getElementById("now"));
      prepare();
      (document.getElementById("text") ?? now().querySelector("h2"))?.focus({ preventScroll: true });
      now().scrollIntoView({ block: "nearest" });
    }
  } catch { /* the connection is lost: the next look may find it again */ }
  if (now().dataset.waits) setTimeout(look, 700);
}

// What is written but not sent yet survives a reload and a lost connection, in this tab.
function rememberDrafts() {
  const version = now()?.dataset.version;
  for (const key of Object.keys(sessionStorage)) if (!key.startsWith(`${version} `)) sessionStorage.removeItem(key);
  for (const area of document.querySelectorAll("#text, #comment")) {
    const key = `${version} ${area.id}`;
    area.value ||= sessionStorage.getItem(key) ?? "";
    area.addEventListener("input", () => sessionStorage.setItem(key, area.value));
  }
}

function prepare() {
  rememberDrafts();
  // Enter sends where there is a keyboard; with Shift it begins a new line.
  document.getElementById("text")?.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing && matchMedia("(pointer: fine)").matches) {
      event.preventDefault();
      event.target.form.requestSubmit();
    }
  });
}

prepare();
if (now()?.dataset.waits) setTimeout(look, 300);
