// Draws a terminal of kata_lab.lab.terminal_view with xterm.js, whose class Terminal is defined before this text.
//
// page → kernel   joined, left, drawn {upto}, typed [bytes], size {rows, columns}, tell size
// kernel → page   replay {page, upto} [bytes], output {upto} [bytes]
//
// Bytes go both ways as they are; xterm.js puts characters together whose bytes come in two messages.

const TOLD = 32768; // bytes drawn before the kernel hears of it, unless there is nothing left to draw
const encoder = new TextEncoder();

function element(kind, className, text = "") {
  const made = document.createElement(kind);
  made.className = className;
  made.textContent = text;
  return made;
}

function bytesOf(buffer) {
  return new Uint8Array(buffer.buffer ?? buffer, buffer.byteOffset ?? 0, buffer.byteLength);
}

// Keys that the page itself takes: copying what is selected, and pasting.
function pageTakes(event, terminal) {
  const key = event.key.toLowerCase();
  const copies = key === "c" && (event.ctrlKey || event.metaKey) && terminal.hasSelection();
  const pastes = (key === "v" && (event.ctrlKey || event.metaKey)) || (key === "insert" && event.shiftKey);
  return !event.altKey && (copies || pastes);
}

function render({ model, el }) {
  const page = Math.random().toString(36).slice(2);
  const say = (kind, content = {}, buffers = []) => model.send({ kind, page, ...content }, undefined, buffers);

  el.classList.add("kata-terminal");
  el.dataset.lmSuppressShortcuts = "true"; // the notebook's one-letter commands are not meant here
  const screen = element("div", "kata-terminal-screen");
  const bar = element("div", "kata-terminal-bar");
  const status = element("span", "kata-terminal-status");
  const size = element("span", "kata-terminal-size");
  const reader = element("button", "kata-terminal-button", "Screen reader");
  status.setAttribute("role", "status");
  reader.setAttribute("aria-pressed", "false");
  reader.title = "Say what is printed to a screen reader";
  bar.append(status, size, reader);
  el.append(screen, bar);
  for (const kind of ["keydown", "keyup", "keypress", "paste", "contextmenu"]) {
    el.addEventListener(kind, (event) => event.stopPropagation());
  }

  const terminal = new Terminal({
    rows: model.get("height"),
    cols: 80,
    fontFamily: "'DejaVu Sans Mono', Menlo, Consolas, 'Liberation Mono', monospace",
    fontSize: 13,
    scrollback: 5000,
    minimumContrastRatio: 4.5,
    linkHandler: { activate() {} },
    theme: { background: "#111111", foreground: "#eeeeee", cursor: "#F0E442", selectionBackground: "#0072B2" },
  });
  terminal.open(screen);
  terminal.textarea.setAttribute("aria-label", "terminal of the guest");

  // Size: as many cells as there is room for.
  let told = "";
  function fit() {
    const cells = screen.querySelector(".xterm-screen").getBoundingClientRect();
    const wide = cells.width / terminal.cols, high = cells.height / terminal.rows;
    if (!wide || !high || !screen.clientWidth) return;
    if (!screen.style.height) screen.style.height = `${Math.ceil(high * model.get("height")) + 12}px`;
    const columns = Math.max(Math.floor((screen.clientWidth - 28) / wide), 20);
    const rows = Math.max(Math.floor((screen.clientHeight - 12) / high), 2);
    if (columns !== terminal.cols || rows !== terminal.rows) terminal.resize(columns, rows);
    size.textContent = `${columns} × ${rows}`;
    if (told !== size.textContent) {
      told = size.textContent;
      say("size", { rows, columns });
    }
  }
  let planned = 0;
  const observer = new ResizeObserver(() => {
    cancelAnimationFrame(planned);
    planned = requestAnimationFrame(fit);
  });
  observer.observe(screen);

  // Output.
  let joined = false, replaying = false, drawing = 0, drawn = 0;
  function draw(bytes, upto) {
    drawing += 1;
    terminal.write(bytes, () => {
      drawing -= 1;
      if (drawing === 0 || upto - drawn >= TOLD) {
        drawn = upto;
        say("drawn", { upto });
      }
    });
  }
  function heard(message, buffers) {
    if (message.kind === "replay" && message.page === page) {
      joined = replaying = true;
      terminal.reset();
      draw(bytesOf(buffers[0]), message.upto);
      terminal.write("", () => { replaying = false; });
    } else if (message.kind === "output" && joined) {
      draw(bytesOf(buffers[0]), message.upto);
    }
  }
  model.on("msg:custom", heard);

  // Input; what xterm.js itself answers to old questions of the guest is not typed a second time.
  const type = (bytes) => { if (!replaying && !model.get("over")) say("typed", {}, [bytes.buffer]); };
  terminal.onData((text) => type(encoder.encode(text)));
  terminal.onBinary((text) => type(Uint8Array.from(text, (each) => each.charCodeAt(0))));
  terminal.attachCustomKeyEventHandler((event) => event.type !== "keydown" || !pageTakes(event, terminal));

  // What is said beneath; ipywidgets tells when the connection to the kernel is gone, or there again.
  let lost = false;
  function tell() {
    const over = lost || model.get("over");
    status.textContent = lost ? "the kernel of this terminal is gone; run the cell again" : model.get("status");
    el.classList.toggle("kata-terminal-over", over);
    terminal.options.disableStdin = over;
  }
  async function link() {
    const known = await model.widget_manager.get_model(model.get("model"));
    lost = known.comm_live === false;
    tell();
  }
  model.on("change:status", tell);
  model.on("change:over", tell);
  model.on("comm_live_update", link);
  tell();
  reader.addEventListener("click", () => {
    terminal.options.screenReaderMode = !terminal.options.screenReaderMode;
    reader.setAttribute("aria-pressed", String(terminal.options.screenReaderMode));
  });
  if (!model.get("sized")) {
    const button = element("button", "kata-terminal-button", "Tell the guest this size");
    button.title = "Type a stty command: a serial line has no size of its own";
    button.addEventListener("click", () => { say("tell size"); terminal.focus(); });
    bar.insertBefore(button, reader);
  }

  const left = () => say("left");
  window.addEventListener("pagehide", left);
  say("joined");

  return () => {
    observer.disconnect();
    cancelAnimationFrame(planned);
    window.removeEventListener("pagehide", left);
    model.off("msg:custom", heard);
    model.off("change:status", tell);
    model.off("change:over", tell);
    model.off("comm_live_update", link);
    left();
    terminal.dispose();
  };
}

export default { render };
