"""The tasks of MiniWoB++: what their pages pay, what counts as solved, how many turns they are given.

Reward is the raw one of the page, without its decay by time. Success is a second column, because some pages pay for
wrong answers, shape their reward, or refuse right answers; `flaw` says so. Boundary: a table; opens no page.
"""

from __future__ import annotations

from dataclasses import dataclass

ANSWER = "+1 right, -1 wrong"
ONLY = "+1; nothing else ends it"


@dataclass(frozen=True)
class Rule:
    """When an ended episode counts as solved: `Rule("raw reward 1", 1.0)`.

    Args:
        says: in words.
        least: the lowest raw reward that does.
        probe: JavaScript; true at the moment of the answer, beside that. "": nothing is asked.
    """

    says: str
    least: float = 1.0
    probe: str = ""


RIGHT = Rule("raw reward 1")
NEAR = Rule("raw reward at least 0.9", 0.9)  # tasks of exactness: within a tenth of what the page forgives


@dataclass(frozen=True)
class Task:
    """One page: Task("click-test", ONLY)."""

    name: str
    reward: str = ANSWER
    success: Rule = RIGHT
    turns: int = 10  # of an episode
    flaw: str = ""  # where the raw reward is not what the instruction says
    expert: bool = True  # whether there is a demonstrator
    status: str = "works"

    @property
    def page(self) -> str:
        """Below the folder `html` of the package."""
        kind, _, rest = self.name.partition(".")
        return f"flight/{rest}/wrapper.html" if kind == "flight" else f"miniwob/{self.name}.html"


PARTS = "(right - wrong) / boxes"
CLOCKED = "works; the page goes on while one acts"
HIDDEN = "; the package registers no environment for it"


EXACT = "1 - miss / what is forgiven, -1 beyond"
COLOR = "1 - mean miss of the channels"

_TABLE = (
    Task("ascending-numbers", "+1, or after a mistake the share that was right", flaw="pays for mistakes"),
    Task("bisect-angle", EXACT, NEAR),
    Task("book-flight", turns=30),
    Task("book-flight-nodelay", turns=30),
    Task("button-delay", "+1, 0.6, 0.35, 0 or -1 by how well one waits", turns=80, status=CLOCKED + HIDDEN),
    Task(
        "buy-ticket",
        "+1 right, -0.5 in between, -1 the opposite",
        turns=5,
        status="works where Arial has its own width (Debian: fonts-liberation); else the last ticket is out of sight",
    ),
    Task("chase-circle", "share of 10 s within the circle", NEAR, 250, status=CLOCKED + HIDDEN),
    Task("choose-date", turns=25),
    Task("choose-date-easy"),
    Task("choose-date-medium"),
    Task("choose-date-nodelay", turns=25),
    Task("choose-list", turns=15),
    Task("circle-center", EXACT, NEAR, 5),
    Task("click-button", turns=5),
    Task("click-button-sequence", turns=5),
    Task("click-checkboxes", PARTS, turns=12, flaw="pays for forms that are mostly right"),
    Task("click-checkboxes-large", PARTS, turns=20, flaw="pays for forms that are mostly right"),
    Task("click-checkboxes-soft", PARTS, turns=12, flaw="pays for forms that are mostly right"),
    Task("click-checkboxes-transfer", PARTS, turns=12, flaw="pays for forms that are mostly right"),
    Task("click-collapsible", turns=15),
    Task("click-collapsible-2", turns=25),
    Task("click-collapsible-2-nodelay"),
    Task("click-collapsible-nodelay"),
    Task("click-color", turns=5),
    Task("click-dialog", ONLY, turns=5),
    Task("click-dialog-2", turns=5),
    Task("click-link", turns=5),
    Task("click-menu", turns=20),
    Task("click-menu-2", turns=15),
    Task("click-option", turns=5),
    Task("click-pie"),
    Task("click-pie-nodelay", status="works; where the first item is asked for, its slice takes no click"),
    Task("click-scroll-list"),
    Task("click-shades", turns=15),
    Task("click-shape", turns=5),
    Task("click-tab", turns=5),
    Task("click-tab-2"),
    Task("click-tab-2-easy", turns=5),
    Task("click-tab-2-hard"),
    Task("click-tab-2-medium", turns=5, flaw="where the link is gone, the click on the second tab is the answer"),
    Task("click-test", ONLY, turns=5),
    Task("click-test-2", turns=5),
    Task("click-test-transfer", turns=5),
    Task("click-widget", turns=5),
    Task("copy-paste"),
    Task("copy-paste-2"),
    Task("count-shape", turns=5),
    Task("count-sides", turns=5),
    Task(
        "daily-calendar",
        success=Rule(
            "raw reward 1, and the event begins in the window",
            probe="+document.querySelector('#newEvent').dataset.start >= "
            "({'8AM': 16, '12PM': 24, '4PM': 32})[/between (\\w+)/.exec(core.getUtterance())[1]]",
        ),
        turns=20,
        flaw="pays for events that begin before the window and end in it",
        status="works where Arial has its own width (Debian: fonts-liberation); else the hours are drawn apart",
    ),
    Task("drag-box"),
    Task("drag-circle"),
    Task("drag-cube", expert=False, turns=20, status=CLOCKED),
    Task("drag-items", turns=5),
    Task("drag-items-grid", turns=5),
    Task("drag-shapes"),
    Task("drag-shapes-2", "+0.26 a shape in its box, -0.2 another, at most 1", turns=15, flaw="pays for four of five"),
    Task("drag-single-shape"),
    Task("drag-sort-numbers"),
    Task(
        "draw-circle",
        "by how even its radius is",
        NEAR,
        expert=False,
        status="works; a straight drag draws no circle",
    ),
    Task("draw-line", "0.8 by direction + 0.2 by distance from the dot", NEAR),
    *(
        Task(f"email-inbox{kind}", turns=20)
        for kind in ("", "-delete", "-forward", "-forward-nl", "-important", "-noscroll", "-reply", "-star-reply")
    ),
    *(
        Task(
            f"email-inbox-{kind}nl-turk", turns=20, flaw="some of the sentences name sender and receiver the wrong way"
        )
        for kind in ("", "forward-")
    ),
    Task("enter-date"),
    Task("enter-password"),
    Task("enter-text"),
    Task("enter-text-2"),
    Task("enter-text-dynamic"),
    Task("enter-time"),
    Task("find-greatest", "+1 right, +0.1 wrong, -1 none", flaw="pays for wrong cards"),
    Task("find-midpoint", EXACT, NEAR, 5),
    Task("find-word"),
    Task("focus-text", ONLY, turns=5),
    Task("focus-text-2", turns=5),
    Task("form-sequence", turns=25),
    Task(
        "form-sequence-2",
        success=Rule(
            "raw reward 1, and the radio button is the one asked for",
            probe="document.querySelector('input[type=radio]:checked')?.value === "
            "/the (\\d)\\w\\w radio/.exec(core.getUtterance())[1]",
        ),
        flaw="pays 1 whichever radio button is checked",
    ),
    Task("form-sequence-3"),
    Task(
        "generate-number",
        success=Rule(
            "raw reward 1, and a number was generated",
            probe="/\\d/.test(document.querySelector('#display-number').textContent)",
        ),
        turns=40,
        flaw="pays 1 for no number at all where an even one is asked for",
    ),
    Task("grid-coordinate", turns=5),
    Task("guess-number", ONLY, turns=30),
    Task("highlight-text", turns=5),
    Task("highlight-text-2", turns=5),
    Task("hot-cold", "+1 within 5 pixels, 0.5 within 10, 0.25 within 40, else -1", turns=30, flaw="pays for misses"),
    Task(
        "hover-shape",
        "none: its continuous reward is no longer in the package",
        Rule("never", 2.0),
        20,
        expert=False,
        status="opens; nothing ends or pays it" + HIDDEN,
    ),
    Task("identify-shape", turns=5),
    Task("login-user"),
    Task("login-user-popup", turns=12),
    Task("moving-items", "-1 + 0.2 a circle - 0.05 a miss, after 9.9 s", NEAR, 150, status=CLOCKED + HIDDEN),
    Task("multi-layouts", turns=12),
    Task("multi-orderings", turns=12),
    Task("navigate-tree"),
    Task("number-checkboxes", turns=30),
    Task("odd-or-even", "mean of +1 right, -1 wrong, -0.25 left out", flaw="pays for two of three"),
    Task("order-food", turns=20),
    Task("phone-book", "+-0.7 contact +-0.3 property", turns=12, flaw="pays for the wrong property of the contact"),
    Task("read-table"),
    Task("read-table-2"),
    Task("resize-textarea"),
    Task("right-angle", "1 - miss / 90 degrees, -1 beyond 45", NEAR, 5),
    Task("scroll-text"),
    Task("scroll-text-2"),
    Task("search-engine", turns=12),
    Task("sign-agreement"),
    Task("simon-says", turns=80, status=CLOCKED + HIDDEN),
    Task("simple-algebra"),
    Task("simple-arithmetic"),
    Task("social-media"),
    Task("social-media-all", turns=30),
    Task("social-media-some", turns=30),
    Task(
        "stock-market",
        success=Rule(
            "raw reward 1, and the price is less than asked, not the same",
            probe="parseFloat(document.querySelector('#stock-price').textContent.slice(1)) < "
            "parseFloat(/than \\$([\\d.]+\\d)/.exec(core.getUtterance())[1])",
        ),
        turns=150,
        flaw="pays for the price itself",
        status=CLOCKED,
    ),
    Task(
        "terminal",
        success=Rule(
            "the file that was removed has the extension",
            -1.0,
            "(([ending], name) => ending ? name.endsWith(ending) : !name.includes('.'))"
            "(/\\.[\\w.]+$/.exec(core.getUtterance()) || [''], [...document.querySelectorAll("
            "'.terminal-line .command:not(#active-input)')].pop().textContent.split(/\\s/)[1] || '.')",
        ),
        turns=15,
        flaw="compares places in the name: pays for vim where .html is asked for, refuses bash.sh",
    ),
    Task("text-editor"),
    Task("text-transform"),
    Task("tic-tac-toe", "+1 won, -0.5 drawn, -0.75 lost"),
    Task("unicode-test", turns=5),
    *(
        Task(
            f"use-autocomplete{kind}",
            success=Rule(
                "raw reward 1, and the text is an item of the list",
                probe="ITEMS.includes(document.querySelector('#tags').value)",
            ),
            flaw="pays for any text with the right beginning and end",
        )
        for kind in ("", "-nodelay")
    ),
    Task("use-colorwheel", COLOR, NEAR, flaw="pays for nearly every color"),
    Task("use-colorwheel-2", COLOR, NEAR, flaw="pays for nearly every color"),
    Task("use-slider", turns=25),
    Task("use-slider-2", turns=40),
    Task("use-spinner", turns=15),
    Task("visual-addition"),
    *(
        Task(
            f"flight.{name}",
            "share of the fields that are right, -1 where one is missing",
            turns=40,
            flaw="pays for forms that are partly right",
            expert=False,
        )
        for name in ("AA", "Alaska", "Alaska-auto")
    ),
)

TASKS = {task.name: task for task in _TABLE}
MODED = frozenset(  # those that have other episodes to test with
    {
        "click-test-transfer", "click-checkboxes-transfer", "email-inbox-forward-nl", "email-inbox-forward-nl-turk",
        "email-inbox-nl-turk", "flight.AA", "flight.Alaska",
    }
)  # fmt: skip
WATCHED = frozenset(  # those of which a demonstrator must see all that happens
    {"click-scroll-list", "count-sides", "hot-cold", "simon-says"}
)
