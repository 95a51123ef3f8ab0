// The office: log in, fill a form and send it, file messages. It knows who may log in and what is there, and nothing of what
// is asked for: that is judged outside, from `desk.report()`. What is typed never becomes markup.
(() => {
  "use strict";
  let content = null;  // accounts, options, messages, folders: as `begin` was told
  let state = null;    // what has happened
  const app = document.getElementById("app");

  const make = (tag, said = {}, ...inside) => {
    const made = document.createElement(tag);
    const { on, ...others } = said;
    Object.assign(made, others);
    for (const [event, does] of Object.entries(on || {})) made.addEventListener(event, does);
    made.append(...inside);
    return made;
  };
  const field = (name, label, type = "text") =>
    make("label", {}, make("span", {}, label), make("input", { type, id: name, autocomplete: "off", spellcheck: false }));
  const value = (name) => document.getElementById(name).value;
  const say = (text, done = false) => { state.said = text; state.done = done; };
  const note = () => make("p", { className: state.done ? "done" : "" }, state.said);
  const show = (screen) => { state.screen = screen; say(""); draw(); };

  const logIn = () => {
    if (content.accounts[value("user")] === value("password")) {
      state.user = value("user");
      return show("home");
    }
    state.failed += 1;
    say("Wrong user or password");
    document.querySelector("p").replaceWith(note());
  };

  const send = () => {
    state.sent.push({
      name: value("name"), city: value("city"), room: value("room"), urgent: document.getElementById("urgent").checked,
    });
    state.screen = "home";
    say("Sent.", true);
    draw();
  };

  const file = (folder) => {
    if (state.chosen === null) {
      say("Choose a message first");
    } else {
      state.filed[state.chosen] = folder;
      state.chosen = null;
      say(`Filed in ${folder}.`, true);
    }
    draw();
  };

  const bar = (...inside) => make("nav", {}, ...inside);
  const go = (screen, label) =>
    make("button", { id: `go-${screen}`, className: state.screen === screen ? "chosen" : "", on: { click: () => show(screen) } }, label);
  const menu = () => bar(make("span", {}, state.user), go("form", "Form"), go("mail", "Mail"));

  const screens = {
    login: () => [
      bar(make("span", {}, "Desk")),
      make("section", {}, field("user", "User"), field("password", "Pass", "password"),
        make("button", { id: "log-in", on: { click: logIn } }, "Log in"), note()),
    ],
    home: () => [menu(), make("section", {}, note(), make("div", {}, "Choose above."))],
    form: () => [
      menu(),
      make("section", {}, field("name", "Name"), field("city", "City"),
        make("label", {}, make("span", {}, "Room"),
          make("select", { id: "room", size: content.rooms.length }, ...content.rooms.map((room) => make("option", { value: room, id: `room-${room}` }, room)))),
        make("label", {}, make("span", {}, "Urgent"), make("input", { type: "checkbox", id: "urgent" })),
        make("button", { id: "send", on: { click: send } }, "Send")),
    ],
    mail: () => {
      const left = content.messages.filter((message) => !(message.id in state.filed));
      const line = (message) => make("li", {
        id: `message-${message.id}`, className: state.chosen === message.id ? "chosen" : "",
        on: { click: () => { state.chosen = message.id; say(""); draw(); } },
      }, make("b", {}, message.from), `: ${message.about}`);
      return [
        menu(),
        make("section", {}, make("ul", {}, ...left.map(line)), note(),
          make("footer", {}, ...content.folders.map((folder) =>
            make("button", { id: `folder-${folder}`, on: { click: () => file(folder) } }, folder)))),
      ];
    },
  };
  const draw = () => app.replaceChildren(...screens[state.screen]());

  const begin = (given) => {
    content = given;
    state = { screen: "login", user: null, failed: 0, sent: [], filed: {}, chosen: null, said: "", done: false };
    draw();
    if (document.activeElement) document.activeElement.blur();
  };

  const report = () => {  // all that has happened, and what can be seen and clicked on
    const seen = [...app.querySelectorAll("input, option, button, li")].map((one) => {
      const box = one.getBoundingClientRect();
      const label = one.closest("label");
      return {
        id: one.id, tag: one.tagName.toLowerCase(),
        text: one.tagName === "INPUT" ? label.firstChild.textContent : one.textContent,
        value: one.type === "checkbox" ? one.checked : one.tagName === "OPTION" ? one.selected : one.value || "",
        focus: document.activeElement === one,
        all: one.tagName === "INPUT" && one.type !== "checkbox" && one.selectionStart === 0 && one.selectionEnd === one.value.length,
        box: [box.x, box.y, box.width, box.height],
      };
    });
    const { screen, user, failed, sent, filed, chosen } = state;
    return { screen, user, failed, sent, filed, chosen, seen };
  };

  Object.defineProperty(globalThis, "desk", { value: Object.freeze({ begin, report }) });
})();
