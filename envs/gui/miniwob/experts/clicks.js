// Demonstrators of the tasks that are clicked: buttons, links, tabs, menus, boxes, colours, shapes.
'use strict';
(() => {
  const { experts, memory, all, one, text, asked, part, quoted, where, visible, wait, click, hover, first } = demonstrators;
  const submit = (css = '#subbtn') => () => click(one(css));

  experts['click-test'] = submit();
  experts['click-test-2'] = submit();
  experts['click-test-transfer'] = () => click(where('button', part(/button (\w+)/)));
  experts['click-button'] = () => click(where('#area button', quoted()[0]));
  experts['unicode-test'] = experts['click-button'];
  experts['click-button-sequence'] = () => click(one(buttonsPushed.length ? '#subbtn2' : '#subbtn'));
  experts['button-delay'] = () => {
    if (!buttonsPushed.length) return click(one('#subbtn'));
    const left = timeDelay * 1000 - (Date.now() - currentTime);
    return left >= 1000 ? wait() : left >= 100 ? hover(one('#subbtn2')) : click(one('#subbtn2'));
  };
  experts['focus-text'] = () => click(one('#tt'));
  experts['focus-text-2'] = () => click(one(`#tt${part(/the (\d)/)}`));
  experts['click-link'] = () => click(where('.alink', quoted()[0]));
  experts['click-dialog'] = () => click(one('.ui-dialog-titlebar-close'));
  experts['click-dialog-2'] = () => {
    const label = quoted()[0];
    return click(label === 'x' ? one('.ui-dialog-titlebar-close') : where('.ui-dialog-buttonset button', label));
  };

  experts['click-tab'] = () => click(one(`a[href="#tabs-${part(/#(\d)/)}"]`));
  const tabs = () => {
    const link = where('.alink', quoted()[0]);
    if (!link) return click(one('a[href="#tabs-2"]'));  // the tab that was emptied
    return click(visible(link) ? link : one(`a[href="#${link.closest('.ui-tabs-panel').id}"]`));
  };
  for (const kind of ['', '-easy', '-medium', '-hard']) experts[`click-tab-2${kind}`] = tabs;

  const moving = () => $(':animated').length > 0;
  experts['click-collapsible'] = () => first(
    () => moving() && wait(),
    () => !visible(one('.ui-accordion-content')) && click(one('#area h3')),
    submit(),
  );
  const collapsible = () => {
    if (moving()) return wait();
    const link = where('.alink', quoted()[0]);
    if (visible(link)) return click(link);
    return click(link.closest('.ui-accordion-content').previousElementSibling);
  };
  experts['click-collapsible-nodelay'] = experts['click-collapsible'];
  experts['click-collapsible-2'] = collapsible;
  experts['click-collapsible-2-nodelay'] = collapsible;

  experts['click-color'] = () => click(one(`#area [data-color="${part(/the (.*) colored/)}"]`));
  experts['click-shades'] = () => {
    const color = part(/shades of (\w+)/);
    const wrong = all('#area span').find((box) => (box.dataset.color === color) !== box.classList.contains('selected'));
    return click(wrong || one('#submit'));
  };
  experts['click-widget'] = () => click(one(`[data-type="${quoted()[0]}"]`));

  const listed = () => part(/^Select (?:words similar to )?(.*?) (?:and click|from the)/).split(', ');
  experts['click-option'] = () => {
    const label = where('label', listed()[0]);
    return one('input', label).checked ? click(one('#subbtn')) : click(label);
  };
  const checkboxes = (means) => () => {
    const names = listed();
    const wrong = all('#area label').find((label) => names.some((name) => means(name, text(label))) !== one('input', label).checked);
    return click(wrong || one('#subbtn'));
  };
  for (const kind of ['', '-large', '-transfer']) experts[`click-checkboxes${kind}`] = checkboxes((name, label) => name === label);
  experts['click-checkboxes-soft'] = checkboxes((name, label) => SYNONYMS.some((group) => group.includes(name) && group.includes(label)));
  experts['number-checkboxes'] = () => {
    const pattern = PATTERNS[quoted()[0]].flat();
    const wrong = all('#checkboxes input').find((box, i) => box.checked !== (pattern[i] === 1));
    return click(wrong || one('#subbtn'));
  };

  // Menus open under the pointer, after a while.
  experts['click-menu'] = () => {
    const names = part(/^Select (.*)$/).split('>');
    let at = one('#menu');
    for (const name of names.slice(0, -1)) {
      const item = [...at.children].find((child) => text(one('div', child)) === name);
      const inner = one('ul', item);
      if (!visible(inner)) return item.matches(':hover') ? wait() : hover(one('div', item));
      at = inner;
    }
    return click(one('div', [...at.children].find((child) => text(one('div', child)) === names[names.length - 1])));
  };
  experts['click-menu-2'] = () => {
    const icon = one('#query .ui-icon');
    const item = all('#menu li').find((entry) => !one('ul', entry)
      && (icon ? one(`.${icon.classList[1]}`, entry) : text(entry) === quoted()[1]));
    if (!visible(one('#menu'))) return click(one('#open-menu'));
    if (visible(item)) return click(one('div', item));
    return click(one('div', item.parentElement.closest('li')));
  };
  experts['click-pie'] = () => {
    const label = all('#divWheel text').find((entry) => text(entry) === quoted()[0]);
    const slice = label && visible(label) && all('#divWheel path').length && label;
    return slice && demonstrators.aim(slice) ? click(slice) : click(one('[id$="spreadertitle"]') || one('[id$="spreader"]'));
  };
  experts['click-pie-nodelay'] = experts['click-pie'];

  // Shapes, letters and digits of a drawing: what is said of them.
  const drawn = (shape) => {
    const kind = { rect: 'rectangle', circle: 'circle', polygon: 'triangle' }[shape.tagName];
    const size = shape.tagName === 'text' ? parseInt(shape.getAttribute('font-size')) : shape.getBBox().width;
    const content = kind || shape.textContent;
    return {
      size: size > 15 ? 'large' : 'small', color: shape.getAttribute('fill'), content,
      type: kind ? 'shape' : /\d/.test(content) ? 'digit' : 'letter',
    };
  };
  const fits = (words) => (shape) => {
    const { size, color, type, content } = drawn(shape);
    const noun = words[words.length - 1];
    return words.slice(0, -1).every((word) => word === size || word === color) && ['item', type, content].includes(noun);
  };
  const figures = (root) => all('rect, circle, polygon, text', one(root));
  experts['click-shape'] = () => {
    const reached = figures('#area_svg').filter(fits(part(/^Click on a (.*)$/).split(' '))).find(demonstrators.aim);
    return click(reached);
  };
  experts['count-shape'] = () => {
    const count = figures('#area_svg').filter(fits(part(/^How many (.*)s are there/).split(' '))).length;
    return click(where('#count-buttons button', String(count)));
  };
  experts['identify-shape'] = () => {
    const { type, content } = drawn(figures('#area_svg')[0]);
    return click(one(`[data-type="${type === 'shape' ? content : type}"]`));
  };
  // The polygon is nowhere but in the picture: its sides are counted as they are drawn.
  const { beginPath, lineTo } = CanvasRenderingContext2D.prototype;
  CanvasRenderingContext2D.prototype.beginPath = function () { this.sides = 0; return beginPath.call(this); };
  CanvasRenderingContext2D.prototype.lineTo = function (...at) { this.sides += 1; return lineTo.apply(this, at); };
  experts['count-sides'] = () => click(one(`[data-sides="${one('#c').getContext('2d').sides}"]`));

  experts['grid-coordinate'] = () => click(document.getElementById(part(/(\(.*\))/)));
  experts['ascending-numbers'] = () => {
    const hidden = all('#area_svg rect').sort((a, b) => a.dataset.index - b.dataset.index);
    return click(hidden[0] || where('#area_svg text', '1'));
  };
  experts['find-greatest'] = () => {
    const cards = all('.card');
    const best = cards.reduce((a, b) => +text(b) > +text(a) ? b : a);
    return best.classList.contains('hidden') ? click(best) : click(one('#submit'));
  };
  experts['odd-or-even'] = () => {
    for (const row of all('.row')) {
      const right = one(+text(one('.display-number', row)) % 2 ? '.odd' : '.even', row);
      if (!right.classList.contains('selected')) return click(right);
    }
    return click(one('#submit'));
  };
  experts['generate-number'] = () => {
    const shown = parseInt(text(one('#display-number'))), bound = +part(/than (\d+)/), say = asked();
    const right = /less/.test(say) ? shown < bound : /greater/.test(say) ? shown > bound : shown % 2 === (/odd/.test(say) ? 1 : 0);
    return click(one(right ? '#submit' : '#generate'));
  };
  experts['navigate-tree'] = () => {
    const file = where('#tree span', quoted()[0]);
    if (visible(file)) return click(file);
    let folder = file;
    do folder = one(':scope > span', folder.closest('ul').closest('li')); while (!visible(folder));
    return click(folder);
  };
  experts['buy-ticket'] = () => {
    const [word, by] = part(/with the (.*)\./).split(' ').length === 2 ? part(/with the (.*)\./).split(' ')
      : ['most', 'cost'];
    const value = (ticket) => by === 'cost' ? +one('.buy-ticket', ticket).dataset.price : +one('.time-duration', ticket).dataset.duration;
    const sorted = all('.flight').sort((a, b) => value(a) - value(b));
    return click(one('.buy-ticket', sorted[/most|longest/.test(word) ? sorted.length - 1 : 0]));
  };
  experts['phone-book'] = () => {
    const [, name, property] = /^Find (.*) in the contact book and click on their (\w+)/.exec(asked());
    return click(text(one('#contact .name')) === name ? one(`#contact .${property}`) : one('#pagination .next a'));
  };

  // Simon shows each button once: what lights up is kept.
  experts['simon-says'] = () => {
    if (!memory.simon) return wait();
    const { shown, pushed, last } = memory.simon;
    if (!shown.length || Date.now() - last < 900) return wait();
    return click(one(`#button-${shown[pushed]}`));
  };
  if (one('#button-1')) {
    const simon = memory.simon = { shown: [], pushed: 0, last: 0 };
    for (const button of all('#area button')) {
      new MutationObserver(() => {
        if (button.classList.contains('push')) { simon.shown.push(button.dataset.button); simon.last = Date.now(); }
      }).observe(button, { attributes: true, attributeFilter: ['class'] });
      button.addEventListener('click', () => { simon.pushed += 1; });
    }
  }
  experts['stock-market'] = () => {
    const price = parseFloat(text(one('#stock-price')).slice(1)), bound = parseFloat(part(/than \$([\d.]+\d)/));
    return price < bound ? click(one('#buy')) : wait();
  };

  // Where the pointer was and how warm it was there leaves ever fewer places.
  experts['hot-cold'] = () => {
    const heat = { HOT: [0, 5], WARM: [5, 10], COLD: [10, 40], 'ICE COLD': [40, 999] };
    const places = memory.places || (memory.places = [...Array(150 * 115)].map((_, i) => [5 + i % 150, 55 + Math.floor(i / 150)]));
    const said = one('#signal') && text(one('#signal'));
    if (said && memory.pointer) {
      const [low, high] = heat[said], [x, y] = memory.pointer;
      memory.places = places.filter((at) => { const far = Math.hypot(at[0] - x, at[1] - y); return far >= low && far < high; });
      if (said === 'HOT') return demonstrators.line('click', memory.pointer);
    }
    const left = memory.places.filter(([x, y]) => x < 155 && y > 53 && y < 176), from = left.length ? left : memory.places;
    return demonstrators.line('move', from[Math.floor(from.length / 2)]);
  };
  addEventListener('mousemove', (event) => { memory.pointer = [event.pageX, event.pageY]; }, true);

  // The best square against an opponent that moves at random in 55 of 100 turns and else blocks or wins.
  experts['tic-tac-toe'] = () => {
    const lines = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 3, 6], [1, 4, 7], [2, 5, 8], [0, 4, 8], [2, 4, 6]];
    const won = (board, who) => lines.some((row) => row.every((at) => board[at] === who));
    const free = (board) => [...board.keys()].filter((at) => !board[at]);
    const put = (board, at, who) => board.map((old, i) => i === at ? who : old);
    const closing = (board, who) => free(board).find((at) => won(put(board, at, who), who));
    const worth = (board) => {  // after our move
      if (won(board, 1)) return 1;
      const left = free(board);
      if (!left.length) return 0;
      const reply = (at) => { const after = put(board, at, -1); return won(after, -1) || !free(after).length ? 0 : best(after)[0]; };
      const mean = left.reduce((sum, at) => sum + reply(at), 0) / left.length;
      const smart = closing(board, -1) ?? closing(board, 1);
      return 0.55 * mean + 0.45 * (smart === undefined ? mean : reply(smart));
    };
    const known = {};
    const best = (board) => known[board] ||= free(board).map((at) => [worth(put(board, at, 1)), at]).reduce((a, b) => b[0] > a[0] ? b : a);
    return click(one(`#ttt-${best(gameState)[1]}`));
  };
})();
