// What every demonstrator has: finding, aiming, scrolling into sight, filling in. They read the page and give the next
// verb line; they act in no other way. Loaded before an episode begins, so that `watch` sees all that the page does.
'use strict';
window.demonstrators = (() => {
  const experts = {};  // by task: () => the next verb line, or null where there is nothing to do
  const memory = {};  // of the running episode, for what a page shows once
  let [width, height] = [160, 210];  // of what is seen
  let lattice = null;  // [columns, rows]: points are the middles of cells; null: all pixels

  const all = (css, root = document) => [...root.querySelectorAll(css)];
  const one = (css, root = document) => root.querySelector(css);
  const plain = (string) => string.replace(/\s+/g, ' ').trim();
  const text = (element) => plain(element.textContent);
  const asked = () => { const said = core.getUtterance(); return said.utterance === undefined ? said : said.utterance; };
  const part = (pattern) => { const found = pattern.exec(asked()); return found ? found[1] : ''; };
  const quoted = () => [...asked().matchAll(/"([^"]*)"/g)].map((match) => match[1]);
  const where = (css, wanted, root = document) => all(css, root).find((element) => text(element) === wanted);
  const visible = (element) => !!element && element.getClientRects().length > 0;

  const cell = () => lattice ? [width / lattice[0], height / lattice[1]] : [1, 1];
  // The whole points of an interval: pixels, or the middles of cells.
  const points = (low, high, size, limit) => {
    const found = [];
    for (let at = Math.max(0, Math.floor(low / size)); at < Math.min(high, limit) / size; at++) {
      const middle = size === 1 ? at : Math.floor((at + 0.5) * size);
      if (middle >= low && middle < high) found.push(middle);
    }
    return found;
  };
  const snap = (x, y) => {
    const [across, down] = cell();
    const near = (value, size, limit) => {
      const at = Math.min(Math.max(0, size === 1 ? Math.round(value) : Math.floor(value / size)), Math.ceil(limit / size) - 1);
      return size === 1 ? at : Math.floor((at + 0.5) * size);
    };
    return [near(x, across, width), near(y, down, height)];
  };

  // A point at which a click reaches the element, the nearest to its middle; null where it is covered or out of sight.
  const aim = (element) => {
    const [across, down] = cell();
    let best = null;
    for (const box of element.getClientRects()) {
      const middle = [box.left + box.width / 2, box.top + box.height / 2];
      const all = [];
      for (const x of points(box.left, box.right, across, width))
        for (const y of points(box.top, box.bottom, down, height))
          all.push([x, y, Math.hypot(x - middle[0], y - middle[1])]);
      all.sort((a, b) => a[2] - b[2]);
      const found = all.find(([x, y]) => {
        const hit = document.elementFromPoint(x, y);
        return hit && (element === hit || element.contains(hit));
      });
      if (found && (!best || found[2] < best[2])) best = found;
    }
    return best && [best[0], best[1]];
  };

  const line = (verb, ...points) => [verb, ...points.map(([x, y]) => snap(x, y)).flat()].join(' ');
  const wait = () => 'wait';
  const press = (key) => `press ${key}`;
  const type = (string) => `type ${string}`;

  // The line that scrolls what holds the element, or null where nothing does.
  const reveal = (element) => {
    for (let holder = element.parentElement; holder && holder !== document.documentElement; holder = holder.parentElement) {
      const style = getComputedStyle(holder);
      if (!/auto|scroll/.test(style.overflowY) || holder.scrollHeight <= holder.clientHeight) continue;
      const box = element.getBoundingClientRect(), frame = holder.getBoundingClientRect();
      const low = Math.max(frame.top, 0), high = Math.min(frame.bottom, height);
      const by = Math.round(box.top + box.height / 2 - (low + high) / 2);
      const room = by > 0 ? holder.scrollHeight - holder.clientHeight - holder.scrollTop : -holder.scrollTop;
      if (Math.abs(by) < 2 || Math.abs(room) < 1) continue;
      const [x, y] = snap(frame.left + frame.width / 2, (low + high) / 2);
      return `scroll ${x} ${y} 0 ${by}`;
    }
    return null;
  };
  const point = (verb, element) => {
    if (!element) return null;
    const at = aim(element);
    if (at) return line(verb, at);
    return reveal(element) || wait();
  };
  const click = (element) => point('click', element);
  const hover = (element) => point('move', element);

  // Puts a text into a field; null once it is there.
  const fill = (field, wanted) => {
    if (!field) return null;
    if (field.value === wanted) return null;
    if (document.activeElement !== field) return click(field);
    const { value, selectionStart: start, selectionEnd: end } = field;
    if (value && start === 0 && end === value.length) return keys(wanted);
    if (wanted.startsWith(value) && (start === null || start === value.length)) return keys(wanted.slice(value.length));
    return press('Control+a');
  };
  // Blanks at the ends of a line are not read: they are keys of their own.
  const keys = (string) => string.startsWith(' ') ? press('Space') : type(string.trimEnd());

  // The first line of several steps that is not done yet.
  const first = (...steps) => { for (const step of steps) { const said = step(); if (said) return said; } return null; };

  return {
    experts, memory, all, one, plain, text, asked, part, quoted, where, visible, snap, aim, line, wait, press, type, reveal,
    click, hover, fill, first,
    next(task, grid) { lattice = grid || null; return experts[task] ? experts[task]() : null; },
  };
})();
