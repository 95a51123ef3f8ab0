// Demonstrators of the tasks that are dragged, drawn and pointed at with care.
'use strict';
(() => {
  const { experts, all, one, text, asked, part, quoted, where, visible, wait, aim, line, press, type, click, fill, first, reveal, snap } =
    demonstrators;
  const submit = (css = '#subbtn') => () => click(one(css));
  const middle = (element) => { const box = element.getBoundingClientRect(); return [box.left + box.width / 2, box.top + box.height / 2]; };

  // Points of a drawing lie 2 right of and 52 below its zero; a page sets what is clicked at x, y to x, y - 50.
  const place = (css) => all(css).map((circle) => [+circle.getAttribute('cx'), +circle.getAttribute('cy')]);
  const dot = (target) => () => {  // one point is set, then submitted
    const [set] = place('#blue-circle'), [x, y] = target(), at = snap(x, y + 50);
    if (set && Math.hypot(set[0] - at[0], set[1] + 50 - at[1]) < 2) return click(one('#subbtn'));
    return line('click', at);
  };
  experts['circle-center'] = dot(() => place('.black-circle')[0]);
  experts['find-midpoint'] = dot(() => { const [[a, b], [c, d]] = place('.black-circle'); return [(a + c) / 2, (b + d) / 2]; });
  const along = ([x, y], angle) => {  // the farthest point of a ray that can be clicked
    let best = null;
    for (let far = 10; far < 160; far += 2) {
      const at = [x + far * Math.cos(angle), y + far * Math.sin(angle)];
      if (at[0] < 4 || at[0] > 148 || at[1] < 4 || at[1] > 120) break;
      best = [...at, far];
    }
    return best;
  };
  experts['right-angle'] = dot(() => {
    const [corner] = place('#init-blue'), [other] = place('#init-black');
    const angle = Math.atan2(other[1] - corner[1], other[0] - corner[0]);
    const ends = [along(corner, angle + Math.PI / 2), along(corner, angle - Math.PI / 2)].filter(Boolean);
    return ends.reduce((a, b) => b[2] > a[2] ? b : a);
  });
  experts['bisect-angle'] = dot(() => {
    const [corner] = place('.init-blue'), [a, b] = place('.init-black');
    const unit = ([x, y]) => { const far = Math.hypot(x - corner[0], y - corner[1]); return [(x - corner[0]) / far, (y - corner[1]) / far]; };
    const [u, v] = [unit(a), unit(b)];
    return along(corner, Math.atan2(u[1] + v[1], u[0] + v[0]));
  });
  experts['draw-line'] = () => {
    if (one('path')) return click(one('#controls button'));
    const [x, y] = middle(one('#circ'));
    const [dx, dy] = /horizontal/.test(asked()) ? [1, 0] : [0, 1];
    const reach = (step, limit, at) => step ? [Math.min(limit - at, at - (step === 1 && dx ? 6 : 56), 45)] : [0];
    const [long] = dx ? reach(1, 146, x) : reach(1, 156, y);
    return line('drag', [x - dx * long, y - dy * long], [x + dx * long, y + dy * long]);
  };

  const shift = { left: [-25, 0], right: [25, 0], up: [0, -25], down: [0, 25] };
  experts['drag-circle'] = () => {
    const shape = one('#area svg > *'), [dx, dy] = shift[part(/ (left|right|up|down) /)];
    if (shape.getAttribute('transform')) return click(one('#subbtn'));
    const [x, y] = middle(shape);
    return line('drag', [x, y], [x + dx, y + dy]);
  };
  experts['drag-single-shape'] = experts['drag-circle'];
  experts['drag-box'] = () => {
    const small = one('#draggableSmall').getBoundingClientRect(), large = one('#draggableLarge').getBoundingClientRect();
    const off = [large.left + 18 - small.left, large.top + 18 - small.top];
    if (Math.hypot(...off) < 6) return click(one('#subbtn'));
    const from = aim(one('#draggableSmall')) || middle(one('#draggableSmall'));
    return line('drag', from, [from[0] + off[0], from[1] + off[1]]);
  };
  const kinds = { rectangles: 'rect:not(#shape-container)', circles: 'circle', triangles: 'polygon' };
  const figures = () => all('#area_svg rect:not(#shape-container), #area_svg circle, #area_svg polygon');
  const inside = (shape, box) => {
    const { x, y } = shapes.gridCoords(shape);
    return x > box.x && x < box.x + box.width && y > box.y && y < box.y + box.height;
  };
  const into = (shape, box, place) => {  // free corners first, so that later shapes can be gripped
    const [, top] = [0, one('#area_svg').getBoundingClientRect()];
    const x = top.left + box.x + 14 + 19 * (place % 3), y = top.top + box.y + 14 + 20 * Math.floor(place / 3);
    return line('drag', aim(shape) || middle(shape), [x, y]);
  };
  experts['drag-shapes'] = () => {
    const box = one('#shape-container').getBBox(), chosen = all(`#area_svg ${kinds[part(/all (\w+) into/)]}`);
    const place = chosen.findIndex((shape) => !inside(shape, box));
    return place < 0 ? click(one('#subbtn')) : into(chosen[place], box, place);
  };
  experts['drag-shapes-2'] = () => {
    const [left, right] = all('#shape-container').map((box) => box.getBBox());
    const word = part(/all (\w+) /), chosen = kinds[word]
      ? all(`#area_svg ${kinds[word]}`) : figures().filter((shape) => shape.getAttribute('fill') === word);
    const rest = figures().filter((shape) => !chosen.includes(shape));
    for (const [group, box] of [[chosen, left], [rest, right]]) {
      const place = group.findIndex((shape) => !inside(shape, box));
      if (place >= 0) return into(group[place], box, place);
    }
    return click(one('#subbtn'));
  };

  // Lists that jQuery UI sorts while an item is dragged over the others. Where it ends depends on the way: that is played
  // in thought, and an end is taken from which all plays, of few moves and of many, leave the item where it belongs.
  const settle = (boxes, from, end, moves, fresh) => {
    const order = boxes.map((_, i) => i), floating = boxes.length > 5;
    let [x, y] = [boxes[from].left + boxes[from].width / 2, boxes[from].top + boxes[from].height / 2];
    const [x0, y0] = [x, y];
    for (let move = 1; move <= moves; move++) {
      const at = [Math.round(x0 + (end[0] - x0) * move / moves), Math.round(y0 + (end[1] - y0) * move / moves)];
      const dx = Math.sign(at[0] - x), dy = Math.sign(at[1] - y);
      [x, y] = at;
      for (const item of order) {
        const box = boxes[fresh ? order.indexOf(item) : item];
        if (item === from || x <= box.left || x >= box.right || y <= box.top || y >= box.bottom) continue;
        const behind = floating ? dx > 0 || dy > 0 : dy > 0;
        if (!floating && !dy) continue;
        if (order[order.indexOf(from) + (behind ? -1 : 1)] === item) continue;
        const right = x > box.left + box.width / 2, low = y > box.top + box.height / 2;
        const beyond = floating && dx ? (dx > 0) === right : dy && (dy > 0) === low;
        if (!beyond) break;
        order.splice(order.indexOf(from), 1);
        order.splice(order.indexOf(item) + (behind ? 1 : 0), 0, from);
        break;
      }
    }
    return order.indexOf(from);
  };
  const carry = (items, from, to) => {
    const boxes = items.map((item) => item.getBoundingClientRect()), ends = [];
    for (const box of boxes)
      for (const x of boxes.length > 5 ? [0.2, 0.35, 0.65, 0.8] : [0.5])
        for (const y of [0.2, 0.35, 0.65, 0.8]) ends.push(snap(box.left + x * box.width, box.top + y * box.height));
    const sure = ([x, y]) => [4, 4, 5, 8, 12, 16].reduce((count, moves) => count
      + (settle(boxes, from, [x, y], moves, true) === to) + (settle(boxes, from, [x, y], moves, false) === to), 0);
    const best = ends.map((end) => [sure(end), end]).reduce((a, b) => b[0] > a[0] ? b : a)[1];
    return line('drag', middle(items[from]), best);
  };
  experts['drag-items'] = () => {
    const items = all('#sortable li'), [, name, goal] = /^Drag (.*?) (?:to the )?((?:up|down|top|bottom|\d).*)\.$/.exec(asked());
    const from = items.findIndex((item) => text(item) === name);
    const to = { 'top': 0, 'bottom': 4, 'up by one position': from - 1, 'down by one position': from + 1 }[goal] ?? parseInt(goal) - 1;
    return carry(items, from, to);
  };
  experts['drag-items-grid'] = () => {
    const items = all('#sortable li'), [, name, goal] = /^Drag (\S+) (.*)\.$/.exec(asked());
    const from = items.findIndex((item) => text(item) === name);
    const by = { 'up by one': -3, 'down by one': 3, 'left by one': -1, 'right by one': 1 }[goal];
    const names = ['top left', 'top center', 'top right', 'center left', 'center', 'center right', 'bottom left', 'bottom center', 'bottom right'];
    return carry(items, from, by ? from + by : names.indexOf(goal.replace('to the ', '')));
  };
  experts['drag-sort-numbers'] = () => {
    const items = all('#sortable li'), numbers = items.map((item) => +text(item)), sorted = [...numbers].sort((a, b) => a - b);
    const to = sorted.findIndex((number, i) => number !== numbers[i]);
    return to < 0 ? click(one('#subbtn')) : carry(items, numbers.lastIndexOf(sorted[to]), to);
  };

  // Text is marked from before its first letter to behind its last.
  const mark = (element, from = 0, to = element.textContent.length) => {
    const range = document.createRange(), walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
    let seen = 0, begun = false;
    for (let node = walker.nextNode(); node; node = walker.nextNode()) {
      const end = seen + node.length;
      if (!begun && from < end) { range.setStart(node, from - seen); begun = true; }
      if (begun && to <= end) { range.setEnd(node, to - seen); break; }
      seen = end;
    }
    const boxes = [...range.getClientRects()].filter((box) => box.width > 0);
    const [head, tail] = [boxes[0], boxes[boxes.length - 1]];
    return line('drag', [head.left + 0.5, head.top + head.height / 2], [tail.right, tail.top + tail.height / 2]);
  };
  const bare = (string) => string.replace(/\s/g, '');
  const highlighted = (element) => bare(getSelection().toString()) === bare(element.textContent)
    ? click(one('#subbtn')) : mark(element, 0, element.textContent.trimEnd().length);
  experts['highlight-text'] = () => highlighted(one('#randomText'));
  experts['highlight-text-2'] = () => highlighted(all('#randomText p')[part(/the (\d)/) - 1]);
  experts['resize-textarea'] = () => {
    const grip = one('.ui-resizable-se'), [x, y] = aim(grip) || middle(grip), by = /larger/.test(asked()) ? 15 : -15;
    const area = one('#tt'), first = area.dataset.first || (area.dataset.first = [area.offsetWidth, area.offsetHeight].join());
    if (first !== [area.offsetWidth, area.offsetHeight].join()) return click(one('#submit'));
    return line('drag', [x, y], /width/.test(asked()) ? [x + by, y] : [x, y + by]);
  };

  experts['text-editor'] = () => {
    const root = one('.ql-editor'), said = asked(), whole = /everything/.test(said);
    const [, style] = /the style (\w+)/.exec(said) || [], [, color] = /the color (\w+)/.exec(said) || [];
    const name = { bold: 'bold', italics: 'italic', underlined: 'underline' }[style] || 'color';
    const content = root.textContent, word = whole ? content : part(/give the text (\S+) the/);
    const start = whole ? 0 : content.search(new RegExp(`(^|\\s)${word.replace(/[.*+?^${}()|[\]\\]/g, '\\$&')}(?=\\s|$)`));
    const from = start + (content[start] === ' ' ? 1 : 0), length = word.length;
    const now = editor.getFormat(from, length), range = editor.getSelection();
    if (style ? now[name] : color && COLOR_MAP[color].includes(now.color)) return click(one('#subbtn'));
    const open = one('.ql-color.ql-expanded');
    if (!open && (!range || range.index !== from || range.length !== length)) return mark(root, from, from + length);
    if (style) return click(one(`button.ql-${name}`));
    if (!open) return click(one('.ql-color .ql-picker-label'));
    return click(all('.ql-color .ql-picker-item').find((item) => COLOR_MAP[color].includes(item.dataset.value) && aim(item)));
  };

  experts['daily-calendar'] = () => {
    const [, long, name, low] = /Create a ([\d.]+ \w+) event named "(.*)", between (\d+[AP]M)/.exec(asked());
    if (one('#create-event')) return first(() => fill(one('#event-name'), name), () => click(one('#create-event .create')));
    const count = { '0.5': 1, '1': 2, '1.5': 3, '30': 1, '60': 2, '90': 3 }[parseFloat(long)];
    const begin = { '8AM': 16, '12PM': 24, '4PM': 32 }[low], busy = all('.event').map((event) => event.getBoundingClientRect());
    const slot = (i) => one(`#hh-${i}`).getBoundingClientRect();
    const free = (i) => busy.every((box) => box.bottom <= slot(i).top + 2 || box.top >= slot(i).bottom - 2);
    const starts = [...Array(9 - count)].map((_, i) => begin + i);
    const from = starts.find((at) => [...Array(count)].every((_, i) => free(at + i))) ?? begin;
    const inSight = (i) => slot(i).top > 54 && slot(i).bottom < 200;
    if (!inSight(from) || !inSight(from + count - 1)) return reveal(one(`#hh-${from + Math.floor(count / 2)}`));
    // The new event grows over the half hours it is drawn from: it is let go inside its last one.
    const edge = (i) => [slot(i).left + slot(i).width - 6, slot(i).top + slot(i).height / 2];
    const off = (i) => [slot(i).left + slot(i).width / 2, slot(i).top + slot(i).height / 2 + 3];
    return count === 1 ? line('drag', off(from), [off(from)[0], off(from)[1] - 4]) : line('drag', off(from), off(from + count - 1));
  };

  experts['chase-circle'] = () => line('move', middle(one('#circ')));
  experts['moving-items'] = () => {
    const seen = all('.item').map(middle).find(([x, y]) => x > 4 && x < 156 && y > 54 && y < 206);
    return seen ? line('click', seen) : wait();
  };
})();
