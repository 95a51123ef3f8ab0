// Runs before anything of a document does: its clock and its chance are those of the episode.
((seed) => {
  const key = Symbol.for("embodied_rft");
  const EPOCH = 1700000000000;
  const told = globalThis[key];
  if (told) return told(seed);
  const Real = Date, real = Real.now;
  let state = 0, shift = null;  // null: the clock stands still
  const set = (seeded) => {
    if (seeded === undefined) shift = real() - EPOCH;
    else [state, shift] = [seeded, null];
  };
  const draw = () => {  // mulberry32
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return (t ^ (t >>> 14)) >>> 0;
  };
  const now = () => (shift === null ? EPOCH : real() - shift);
  const Shifted = new Proxy(Real, {
    construct: (target, given, as) => Reflect.construct(target, given.length ? given : [now()], as),
    apply: () => new Shifted().toString(),
    get: (target, name) => (name === "now" ? now : Reflect.get(target, name)),
  });
  Real.prototype.constructor = globalThis.Date = Shifted;
  Math.random = () => draw() / 2 ** 32;
  Crypto.prototype.getRandomValues = (array) => {
    const bytes = new Uint8Array(array.buffer, array.byteOffset, array.byteLength);
    for (let i = 0; i < bytes.length; i++) bytes[i] = draw() & 255;
    return array;
  };
  const still = new CSSStyleSheet();
  still.replaceSync(":root { caret-animation: manual }");  // a cursor that blinks is there or not by chance
  document.adoptedStyleSheets.push(still);
  let clipboard = "";  // the browser's own belongs to all its tabs
  const copy = () => {
    const box = document.activeElement;
    const typed = typeof box?.selectionStart === "number";
    clipboard = typed ? box.value.slice(box.selectionStart, box.selectionEnd) : String(getSelection());
  };
  const paste = (event) => {
    if (!event.isTrusted) return;
    event.stopImmediatePropagation();
    event.preventDefault();
    const clipboardData = new DataTransfer();
    clipboardData.setData("text/plain", clipboard);
    const ours = new ClipboardEvent("paste", { clipboardData, bubbles: true, cancelable: true });
    if (event.target.dispatchEvent(ours)) document.execCommand("insertText", false, clipboard);
  };
  addEventListener("copy", copy, true);
  addEventListener("cut", copy, true);
  addEventListener("paste", paste, true);
  let drag = null;
  addEventListener("dragstart", (event) => { drag = event; }, true);
  addEventListener("dragend", () => { drag = null; }, true);
  addEventListener("mousedown", () => { drag = null; }, true);
  set.drags = () => drag !== null && !drag.defaultPrevented;
  set.real = () => real.call(Real);
  Object.defineProperty(globalThis, key, { value: set });
  set(seed);
})
