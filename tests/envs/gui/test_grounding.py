"""Find the element: exact boxes, the parts of the reward by their formulas, answers that are none, options."""

import gymnasium
import numpy as np
import pytest

import embodied_rft.envs  # noqa: F401
from embodied_rft.envs.gui.drawn import PAGE
from embodied_rft.envs.gui.elements import read_elements
from embodied_rft.envs.gui.grounding import ID, fit
from embodied_rft.experience.demonstrate import make_demonstrator
from embodied_rft.pools.pool import make_pool

PARTS = {"hit": 1.0, "iou": 0.25, "edges": 0.125}


def make(**options):
    """One screen, with an expert beside it."""
    return gymnasium.make(ID, **{"expert": True, "state": True, **options})


def boxes(state):
    """{name: box} of all elements, x1, y1, x2, y2."""
    told = [(each.text, *map(int, each.box)) for each in read_elements(state)]
    return {text: np.array([x, y, x + width, y + height]) for text, x, y, width, height in told}


def painted(box, size):
    """Its pixels [S, S] bool."""
    mask = np.zeros((size, size), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def test_the_parts_are_their_formulas():
    rng = np.random.default_rng(0)
    for _ in range(50):
        one, other = (np.concatenate([low := rng.integers(0, 30, 2), low + rng.integers(1, 30, 2)]) for _ in range(2))
        a, b = painted(one, 64), painted(other, 64)
        found = fit(one, other, 64)
        assert found.iou == pytest.approx((a & b).sum() / (a | b).sum())
        assert found.area == pytest.approx(a.sum() / b.sum())
        near = [1 - abs(int(p) - int(q)) / 64 for p, q in zip(one, other)]
        assert found.edges == pytest.approx(4 / sum(1 / n for n in near))
        x, y = (one[0] + one[2]) / 2, (one[1] + one[3]) / 2
        assert found.hit == (other[0] <= x < other[2] and other[1] <= y < other[3])
    assert fit(np.array([0, 0, 64, 64]), np.array([0, 0, 64, 64]), 64) == (1, 1, 1, 1)
    assert fit(np.array([0, 0, 1, 1]), np.array([64, 0, 65, 1]), 64).edges == 0
    element = np.array([2, 2, 8, 8])
    for middle, hit in (((2, 5), 1), ((8, 5), 0), ((5, 2), 1), ((5, 8), 0)):  # the last pixels are not in it
        assert fit(np.array([*middle, *middle]) + [-1, -1, 1, 1], element, 64).hit == hit


@pytest.mark.parametrize(
    "options", [{}, {"kinds": ["icon"], "alike": True, "elements": 6}, {"kinds": ["word"]}, {"size": 200}]
)
def test_boxes_are_exact_and_do_not_overlap(options):
    env = make(**options)
    for seed in range(20):
        seen, _ = env.reset(seed=seed)
        covered = sum(painted(box, len(seen["image"])).astype(int) for box in boxes(seen["state"]).values())
        assert covered.max() == 1 and (seen["image"][covered == 0] == PAGE).all()
        for box in boxes(seen["state"]).values():  # frames, all around
            frame = seen["image"][box[1] : box[3], box[0] : box[2]]
            edge = np.concatenate([frame[0], frame[-1], frame[:, 0], frame[:, -1]])
            assert (edge == edge[0]).all() and not (edge[0] == PAGE).all()
        assert any(name in seen["message"] for name in boxes(seen["state"]))


@pytest.mark.parametrize("options", [{}, {"grid": [8, 8]}, {"grid": [16, 16], "style": "short", "parser": "tags"}])
@pytest.mark.parametrize("answer", ["box", "point"])
def test_the_expert_hits_and_the_reward_is_the_mixture(answer, options):
    weights = PARTS if answer == "box" else {"hit": 2.0}
    env, told = make(answer=answer, rewards=weights, **options), []
    for seed in range(30):
        seen, _ = env.reset(seed=seed)
        _, reward, over, _, info = env.step(seen["expert"])
        assert over and info["is_success"] == info["reward/hit"] == 1
        assert reward == pytest.approx(sum(weight * info[f"reward/{part}"] for part, weight in weights.items()))
        target = next(box for name, box in boxes(seen["state"]).items() if name in seen["message"])
        assert info["box/target"] == pytest.approx((target[2:] - target[:2]).prod() / 64**2)
        told.append(info)
    if answer == "box" and not options:
        assert all(info["reward/iou"] == info["reward/edges"] == info["box/area"] == 1 for info in told)
    assert answer == "box" or not any("iou" in name or "area" in name for name in told[0])


def test_a_hit_is_no_matter_of_size_and_a_near_miss_is_none():
    env = make(grid=None, rewards=PARTS)
    for seed in range(20):
        seen, _ = env.reset(seed=seed)
        x1, y1, x2, y2 = next(box for name, box in boxes(seen["state"]).items() if name in seen["message"])
        inner = f"{(x1 + x2) // 2} {(y1 + y2) // 2} {(x1 + x2) // 2 + 1} {(y1 + y2) // 2 + 1}"
        small = env.step(inner)[4]
        env.reset(seed=seed)
        beside = (x2, y1, min(x2 + 6, 64), y2) if x2 < 63 else (max(x1 - 6, 0), y1, x1, y2)
        missed = env.step(" ".join(map(str, beside)))[4]
        assert small["reward/hit"] == 1 and small["reward/iou"] < 0.1 and small["box/area"] < 0.05
        assert missed["is_success"] == missed["reward/hit"] == missed["reward/iou"] == 0 < missed["reward/edges"]


def test_answers_that_are_none_end_the_episode_without_a_part():
    env = make(invalid=-0.5, rewards=PARTS, grid=[8, 8])
    for said in ("", "1 2", "3 3 3 4", "5 5 4 6", "0 0 9 9", "1 1 2 x"):
        env.reset(seed=0)
        _, reward, over, _, info = env.step(said)
        assert over and reward == -0.5 and info["is_success"] == 0
        assert info["reward/hit"] == info["reward/iou"] == info["reward/edges"] == 0 == info["box/area"]
        assert info["invalid/empty"] + info["invalid/unknown_word"] == 1


@pytest.mark.parametrize(
    "options, said",
    [
        ({"answer": "boxes"}, "did you mean 'box'"),
        ({"rewards": {"iuo": 1}}, "did you mean 'iou'"),
        ({"answer": "point", "rewards": {"iou": 1}}, "no part of the reward of a point"),
        ({"kinds": ["icons"]}, "did you mean 'icon'"),
        ({"elements": 0}, "1 to 16"),
        ({"elements": 16, "sides": [30, 32]}, "no room"),
        ({"sides": [4, 10]}, "shortest"),
        ({"kinds": ["word"], "alike": True}, "no effect"),
        ({"colors": 1, "shapes": 2}, "do not make so many"),
        ({"colors": 7}, "1 to 6: red"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        make(**options)


def test_others_are_alike_if_asked_for():
    for alike in (False, True):
        env, shared = make(kinds=["icon"], alike=alike), []
        for seed in range(40):
            seen, _ = env.reset(seed=seed)
            names = list(boxes(seen["state"]))
            asked = next(name for name in names if name in seen["message"])
            shared += [bool({*asked.split()} & {*name.split()}) for name in names if name != asked]
        assert (np.mean(shared) == 1) == alike


def test_a_batch_is_its_rows_and_states_are_exact():
    options = {"expert": True, "grid": [8, 8]}
    pool, single = make_pool(ID, 4, options=options), gymnasium.make(ID, **options)
    seen = pool.reset(np.arange(4))
    for row in range(4):
        alone, _ = single.reset(seed=row)
        assert seen["message"][row] == alone["message"] and (seen["image"][row] == alone["image"]).all()
    other = make_pool(ID, 4, options=options)
    other.reset(np.arange(9, 13))
    other.set_state(pool.get_state())
    said = make_demonstrator(ID, env_options=options, noise=0.5).act(seen, np.random.default_rng(0))
    assert (pool.step(said).reward == other.step(said).reward).all()
