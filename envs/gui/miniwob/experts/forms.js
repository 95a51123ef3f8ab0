// Demonstrators of the tasks that are typed and filled in: fields, lists, sliders, dates, searches, a terminal.
'use strict';
(() => {
  const { experts, memory, all, one, text, asked, part, quoted, where, visible, aim, line, wait, press, type, reveal, click, fill, first } =
    demonstrators;
  const submit = (css = '#subbtn') => () => click(one(css));
  const form = (answers) => () => first(
    ...Object.entries(answers()).map(([css, answer]) => () => fill(one(css), String(answer))), submit());

  experts['enter-text'] = form(() => ({ '#tt': quoted()[0] }));
  experts['enter-text-dynamic'] = experts['enter-text'];
  experts['enter-text-2'] = form(() => ({
    '#tt': /upper case/.test(asked()) ? quoted()[0].toUpperCase() : quoted()[0].toLowerCase() }));
  experts['enter-password'] = form(() => ({ '#password': quoted()[0], '#verify': quoted()[0] }));
  experts['login-user'] = form(() => ({ '#username': quoted()[0], '#password': quoted()[1] }));
  experts['login-user-popup'] = () => one('#popup') ? click(one('#popup-cancel')) : experts['login-user']();
  experts['text-transform'] = form(() => ({ '#tt': text(one('#captcha')) }));
  experts['simple-arithmetic'] = form(() => {
    const [a, sign, b] = text(one('#math-problem')).split(' ');
    return { '#math-answer': sign === '+' ? +a + +b : sign === '-' ? a - b : a * b };
  });
  experts['simple-algebra'] = form(() => {
    const [a, sign, b, , sum] = text(one('#math-problem')).split(' ');
    if (a === 'x') return { '#math-answer': sign === '+' ? sum - b : +sum + +b };
    return { '#math-answer': sign === '+' ? sum - a : a - sum };
  });
  experts['visual-addition'] = form(() => ({ '#math-answer': all('.addition-block').length }));
  experts['find-word'] = form(() => ({
    '#answer-input': text(one('#area p')).split(' ')[part(/the (\d+)/) - 1].replace(/[^a-zA-Z]/g, '') }));
  experts['scroll-text'] = () => {
    const box = one('#text-area');
    if (box.scrollTop + box.clientHeight < box.scrollHeight - 2 && !one('#answer-input').value) {
      const at = aim(box);
      return at && `${line('scroll', at)} 0 ${box.scrollHeight}`;
    }
    return form(() => ({ '#answer-input': box.value.trim().split(/\s/).pop().replace('.', '') }))();
  };
  experts['scroll-text-2'] = () => {
    const box = one('#text-area'), down = /bottom/.test(asked());
    const far = down ? box.scrollHeight - box.clientHeight - box.scrollTop : box.scrollTop;
    return far > 2 ? `${line('scroll', aim(box))} 0 ${down ? box.scrollHeight : -box.scrollHeight}` : click(one('#subbtn'));
  };
  experts['read-table'] = form(() => {
    const key = part(/value of (.*) into/), row = all('#tab tr').find((entry) => text(entry.children[0]) === key);
    return { '#tt': text(row.children[1]) };
  });
  experts['read-table-2'] = form(() => {
    const value = (label) => text(all('#tab tr').find((entry) => text(entry.children[0]) === text(one(label)).slice(0, -1)).children[1]);
    return { '#tt1': value('#ll1'), '#tt2': value('#ll2') };
  });
  experts['copy-paste'] = form(() => ({ '#answer-input': one('#to-copy').value }));
  experts['copy-paste-2'] = form(() => ({ '#answer-input': one(`#text-${part(/the (\d)/)}`).value }));
  const movies = () => {
    const [, genre, name, year] = /for (.*) movies directed by (.*) from year (\d+)/.exec(asked());
    const answers = { genre, director: name, year, released: year };
    const label = (field) => text(field.closest('p, tr, .row, .field, .ui-entry')).toLowerCase();
    const wrong = all('#area input').map((field) => {
      const key = Object.keys(answers).find((word) => label(field).includes(word));
      return () => fill(field, answers[key]);
    });
    return first(...wrong, () => click(one('#area button, #area .final, #area .ui-submit')));
  };
  experts['multi-layouts'] = movies;
  experts['multi-orderings'] = movies;

  // Guesses by halves: each number is reached from one side only.
  experts['guess-number'] = () => {
    const next = { '4+': 7, '7-': 6, '6-': 5, '7+': 8, '8+': 9, '4-': 1, '1+': 2, '2+': 3, '1-': 0 };
    const said = all('#higher, #lower').find(visible);
    const guess = said ? next[text(one('span', said)) + (said.id === 'higher' ? '+' : '-')] : 4;
    const field = one('#tt');
    if (field.value === String(guess)) return click(one('#subbtn'));
    if (document.activeElement !== field) return click(field);
    return field.value ? press('Backspace') : type(String(guess));
  };

  // Fields of dates and times take the digits one after another.
  const digits = (wanted, keys) => () => {
    const field = one('#tt');
    if (field.value === wanted) return click(one('#subbtn'));
    if (document.activeElement === field) return type(keys);
    const box = field.getBoundingClientRect();
    return line('click', [box.left + 10, box.top + box.height / 2]);
  };
  experts['enter-date'] = () => {
    const [month, day, year] = part(/([\d/]+)/).split('/');
    return digits(`${year}-${month}-${day}`, month + day + year)();
  };
  experts['enter-time'] = () => {
    const [, hour, minute, half] = /(\d+):(\d+)\s*([AP])M/.exec(asked());
    const two = (number) => String(number).padStart(2, '0');
    return digits(`${two(hour % 12 + (half === 'P' ? 12 : 0))}:${minute}`, two(hour) + minute + half)();
  };
  const pick = (field, wanted) => {  // a day of a calendar that opens at the field
    const [month, day, year] = wanted.split('/').map(Number);
    if (field.value === wanted) return null;
    const calendar = one('#ui-datepicker-div');
    if (!visible(calendar)) return click(field);
    if ($(calendar).is(':animated')) return wait();
    const name = text(one('.ui-datepicker-month', calendar)), at = new Date(`${name} 1, ${text(one('.ui-datepicker-year', calendar))}`);
    const ahead = (year - at.getFullYear()) * 12 + month - 1 - at.getMonth();
    if (ahead) return click(one(ahead < 0 ? '.ui-datepicker-prev' : '.ui-datepicker-next', calendar));
    return click(where('td a', String(day), calendar));
  };
  for (const kind of ['', '-easy', '-medium', '-nodelay'])
    experts[`choose-date${kind}`] = () => first(() => pick(one('#datepicker'), part(/([\d/]+)/)), submit());

  // A closed list follows what is typed while it has the focus.
  experts['choose-list'] = () => {
    const list = one('#options'), wanted = part(/^Select (.*) from the list/);
    if (list.value === wanted) return click(one('#area button'));
    if (document.activeElement !== list) return press('Tab');
    const index = [...list.options].findIndex((option) => option.text === wanted);
    return press(index > list.selectedIndex ? 'ArrowDown' : 'ArrowUp');
  };
  // The first option is clicked, others are reached and marked by keys.
  experts['click-scroll-list'] = () => {
    const list = one('#options'), wanted = part(/^Select (.*) from the scroll/).split(', ');
    const options = [...list.options], wrong = options.filter((entry) => wanted.includes(entry.text) !== entry.selected);
    if (!wrong.length) return click(one('#area button'));
    if (!options.some((entry) => entry.selected && wanted.includes(entry.text)) || memory.active === undefined) return click(wrong[0]);
    if (memory.active === wrong[0].index) return press('Control+Space');
    return press(wrong[0].index > memory.active ? 'Control+ArrowDown' : 'Control+ArrowUp');
  };
  addEventListener('mousedown', ({ target }) => { if (target.tagName === 'OPTION') memory.active = target.index; }, true);
  addEventListener('keydown', ({ key, ctrlKey, target }) => {
    const by = { ArrowDown: 1, ArrowUp: -1 }[key];
    if (by && ctrlKey && target.tagName === 'SELECT')
      memory.active = Math.min(Math.max(memory.active + by, 0), target.options.length - 1);
  }, true);
  experts['form-sequence-3'] = () => {
    const wanted = part(/^Choose (.*) from the dropdown/);
    if (one('#dropdown').value === wanted) return click(where('#buttons button', quoted()[0]));
    if (!one('.selectric-open')) return click(one('.selectric'));
    return click(where('.selectric-items li', wanted));
  };
  experts['form-sequence-2'] = () => {
    const [, radio, number, box] = /the (\d)\w\w radio.*number "(.*)" into the (\d)/.exec(asked());
    const button = one(`input[type=radio][value="${radio}"]`);
    return first(() => !button.checked && click(button), () => fill(one(`#input-${box}`), number), submit());
  };

  // A slider jumps to where its track is clicked; keys do the rest.
  const slide = (slider, wanted) => {
    const { min, max, orientation } = $(slider).slider('option'), value = $(slider).slider('value');
    if (value === wanted) return null;
    const box = slider.getBoundingClientRect(), upright = orientation === 'vertical', handle = one('.ui-slider-handle', slider);
    const share = (number) => (number - min) / (max - min), long = upright ? box.height : box.width;
    if (document.activeElement === handle && Math.abs(share(value) - share(wanted)) * long < 14)
      return press(wanted > value ? 'ArrowRight' : 'ArrowLeft');
    if (Math.abs(share(value) - share(wanted)) * long < 14) return click(handle);
    const at = [box.left + (upright ? box.width / 2 : share(wanted) * box.width), upright ? box.bottom - share(wanted) * box.height : box.top + box.height / 2];
    return line('click', at);
  };
  experts['use-slider'] = () => first(() => slide(one('#slider'), +part(/^Select (-?\d+)/)), submit());
  experts['use-slider-2'] = () => {
    const wanted = JSON.parse(part(/(\[.*\])/));
    return first(...wanted.map((number, i) => () => slide(one(`#slider-${i + 1}`), number)), submit());
  };
  experts['form-sequence'] = () => {
    const wanted = one(`#checkbox-${part(/the (\d)\w\w checkbox/)}`);
    const wrong = all('#area input').find((box) => box.checked !== (box === wanted));
    return first(() => slide(one('#slider'), +part(/^Select (-?\d+)/)), () => click(wrong), submit());
  };
  experts['use-spinner'] = () => {
    const wanted = +part(/^Select (-?\d+)/), value = +one('#spinner').value;
    return click(value === wanted ? one('#subbtn') : one(value < wanted ? '.ui-spinner-up' : '.ui-spinner-down'));
  };

  experts['use-autocomplete'] = () => {
    const [start, end = ''] = quoted();
    const item = ITEMS.find((entry) => entry.startsWith(start) && entry.endsWith(end));
    const field = one('#tags');
    return first(() => fill(field, item), () => document.activeElement === field && press('Tab'), submit());
  };
  experts['use-autocomplete-nodelay'] = experts['use-autocomplete'];
  const painted = (color) => () => {
    const field = one('#col');
    if (field.value.toLowerCase() !== color()) return fill(field, color());
    return aim(one('#subbtn')) ? click(one('#subbtn')) : click(one('#query'));
  };
  const hex = (css) => css.match(/\d+/g).slice(0, 3).map((part) => (+part).toString(16).padStart(2, '0')).join('');
  experts['use-colorwheel'] = painted(() => ui_utils.colorNameToHex(part(/^Select (\w+) with/)).slice(1));
  experts['use-colorwheel-2'] = painted(() => hex(getComputedStyle(one('.cc')).backgroundColor));

  experts['search-engine'] = () => {
    const [name] = quoted(), index = part(/the (\d+)\w\w search/) - 1;
    const shown = all('#page-content a');
    if (!shown.length || shown[0].dataset.result === '-1')
      return first(() => fill(one('#search-text'), name), () => click(one('#search')));
    const link = shown.find((entry) => +entry.dataset.result === index);
    return click(link || where('#pagination .page-item a', String(Math.floor(index / 3) + 1)));
  };
  experts['sign-agreement'] = () => {
    const [name] = quoted(), field = one('#name'), box = one('#text-area');
    const last = one(/press "Agree"/.test(asked()) ? '#agree' : '#cancel');
    if (!name || /cancel button/.test(asked())) return click(one('#cancel'));
    if (field.disabled) return `${line('scroll', aim(box))} 0 ${box.scrollHeight}`;
    return first(() => fill(field, name), () => click(last));
  };
  experts['terminal'] = () => {
    const ending = part(/extension \.?(.*)$/).trim(), none = /no file extension/.test(asked());
    const typed = one('#active-input').textContent;
    const listed = all('.terminal-line .command:not(#active-input)').some((entry) => text(entry) === 'ls');
    const fits = currentFiles.filter((name) => none ? !name.includes('.') : name.endsWith(`.${ending}`));
    const wanted = listed ? `rm ${fits.find((name) => none || name.indexOf(ending) + ending.length === name.length) || fits[0]}` : 'ls';
    if (typed === wanted) return press('Enter');
    if (document.activeElement !== one('#terminal-target')) return click(one('#terminal'));
    return wanted.startsWith(typed) ? type(wanted.slice(typed.length)) : press('Backspace');
  };

  experts['order-food'] = () => {
    const items = all('.food-item'), [, many, kind] = /Order (\d+) items that are (.*)$/.exec(asked()) || [];
    const fitting = many ? items.filter((item) => all('img', item).some((image) => image.title === kind))
      : items.filter((item) => part(/item: (.*)$/).split(', ').includes(item.dataset.item.trim()));
    const count = many ? +many : fitting.length;
    for (const item of items) {
      const place = fitting.indexOf(item), missing = Math.floor((count - 1 - place) / fitting.length) + 1;
      const wanted = place < 0 ? 0 : missing, has = +item.dataset.quantity;
      if (has !== wanted) return click(one(has < wanted ? '.add' : '.remove', item));
    }
    return click(one('#submit-order button'));
  };
  const flight = () => {
    const [, best, from, to, date] = /Book the (\w+) one-way flight from: (.*) to: (.*) on ([\d/]+)\./.exec(asked());
    if (visible(one('#results'))) {
      const value = (entry) => best === 'shortest' ? +one('.time-duration', entry).dataset.duration : +one('.flight-price', entry).dataset.price;
      return click(one('.flight-price', all('.flight').reduce((a, b) => value(b) < value(a) ? b : a)));
    }
    const town = (field, name) => {
      const wanted = DOMESTIC_FLIGHTS.find((entry) => entry.includes(name.length === 3 ? `(${name})` : `${name} (`));
      return first(() => fill(field, wanted), () => document.activeElement === field && press('Tab'));
    };
    return first(() => town(one('#flight-from'), from), () => town(one('#flight-to'), to),
      () => pick(one('#datepicker'), date), () => click(one('#search')));
  };
  experts['book-flight'] = flight;
  experts['book-flight-nodelay'] = flight;
})();
