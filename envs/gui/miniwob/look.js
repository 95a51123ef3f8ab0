// How an episode stands, and what can be seen of its page: [tag, text, left, top, width, height] of each element.
(width, height) => {
  const inner = document.querySelector('iframe#wrap');
  const page = inner ? inner.contentDocument : document;
  const outside = '#query, #query-wrap, #reward-display, #click-canvas, #sync-task-cover, script, style';
  const named = 'button, a, input, textarea, select, label, li, [onclick]';
  const elements = [];
  const walk = (element) => {
    if (element.matches(outside)) return false;
    const inside = [...element.children].map(walk).some(Boolean);
    const box = element.getBoundingClientRect();
    const seen = box.width > 0 && box.height > 0 && box.left < width && box.top < height && box.right > 0 && box.bottom > 0;
    if (!seen || element === page.body || (inside && !element.matches(named))) return inside;
    const kind = element.matches('input') ? element.type : element.tagName.toLowerCase();
    const text = 'value' in element && element.matches('input, textarea, select') ? element.value : element.textContent;
    const plain = String(text).replace(/\s+/g, ' ').trim().slice(0, 100);
    elements.push([element.checked ? `${kind}-checked` : kind, plain, box.left, box.top, box.width, box.height]);
    return true;
  };
  if (!WOB_DONE_GLOBAL && page && page.body) walk(page.body);
  return { done: WOB_DONE_GLOBAL, raw: WOB_RAW_REWARD_GLOBAL, solved: window.solved === true, elements };
}
