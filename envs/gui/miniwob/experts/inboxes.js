// Demonstrators of the inboxes and of the social feeds.
'use strict';
(() => {
  const { experts, all, one, text, asked, quoted, where, visible, click, fill, first, line, press, aim } = demonstrators;

  // What is to be done; natural-language tasks say it in fields beside the sentence.
  const order = () => {
    const fields = core.currentFields;
    if (fields) return { task: fields.task || 'forward', by: fields.by, to: fields.to, message: fields.message };
    const by = /email by (\w+)/.exec(asked())[1];
    if (/reply/.test(asked())) return { task: 'reply', by, message: quoted()[0] };
    if (/forward/.test(asked())) return { task: 'forward', by, to: /to (\w+)\.$/.exec(asked())[1] };
    return { task: /trash/.test(asked()) ? 'delete' : 'star', by };
  };
  const inbox = () => {
    const { task, by, to, message } = order();
    if (visible(one('#reply'))) return first(() => fill(one('#reply-text'), message), () => click(one('#send-reply')));
    if (visible(one('#forward'))) return first(() => fill(one('.forward-sender'), to), () => click(one('#send-forward')));
    const open = visible(one('#email')) && one('#email');
    if (open) {
      if (text(one('.email-sender', open)) !== by) return click(one('#close-email'));
      return click(one({ reply: '.email-reply', forward: '.email-forward', delete: '.trash', star: '.star' }[task], open));
    }
    if (visible(one('#search'))) return click(one('#search-cancel'));
    const thread = all('#main .email-thread').find((entry) => text(one('.email-sender', entry)) === by);
    return click(task === 'delete' ? one('.trash', thread) : task === 'star' ? one('.star', thread) : one('.email-subject', thread));
  };
  for (const kind of ['', '-delete', '-forward', '-forward-nl', '-forward-nl-turk', '-important', '-nl-turk', '-noscroll', '-reply', '-star-reply'])
    experts[`email-inbox${kind}`] = inbox;

  const posts = (name) => all('.media').filter((entry) => text(one('.username', entry)) === name);
  const press_ = (entry, word) => one({ Reply: '.reply', Retweet: '.retweet', Like: '.like', Share: '.share' }[word], entry);
  experts['social-media'] = () => {
    const [, name, action] = /For the user (.*), click on the "(.*)" button/.exec(asked());
    const entry = posts(name)[0];
    if (/^(Reply|Retweet|Like)$/.test(action)) return click(press_(entry, action));
    const list = one('ul', entry);
    if (!visible(list)) return click(one('.more', entry));
    return click(all('li', list).find((item) => text(item).startsWith(action)));
  };
  const feed = () => {
    const [, word, count, name] = /Click the "(\w+)" button on (\w+) posts? by (.*) and then click/.exec(asked());
    const wanted = new Set(posts(name).slice(0, count === 'all' ? undefined : +count).map((entry) => press_(entry, word)));
    const wrong = all('.reply, .retweet, .like, .share').find((button) => button.classList.contains('active') !== wanted.has(button));
    return click(wrong || one('#submitRow button'));
  };
  experts['social-media-all'] = feed;
  experts['social-media-some'] = feed;
})();
