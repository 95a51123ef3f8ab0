"""Environments: importing this package registers them with Gymnasium. What an id is made of is imported when needed.

Example, after `import gymnasium, embodied_rft.envs`:

    gymnasium.make("embodied_rft/FetchPickAndPlace-v0")  # one environment
    gymnasium.make_vec("embodied_rft/FetchPickAndPlace-v0", num_envs=64)  # a native batch
"""

if __name__ != "embodied_rft.envs":  # one module must have one name
    raise ImportError("import embodied_rft.envs, not envs")

import gymnasium

from embodied_rft.envs.serving import serve

_ARMS, _TEXT, _GAMES, _TURNS, _WORLDS, _GUI = (
    f"{__name__}.{room}" for room in ("manipulation", "text", "games", "turns", "worlds", "gui")
)

for _name in ("Reach", "Push", "Slide", "PickAndPlace"):
    _fetch = {"batch": f"{_ARMS}.fetch:FetchSimulation", "task": f"{_ARMS}.fetch:FetchTask", "name": _name}
    serve(f"embodied_rft/Fetch{_name}-v0", **_fetch, max_episode_steps=50)

_peg = {"batch": f"{_ARMS}.simulation:Simulation", "task": f"{_ARMS}.peg_insert:PegInsertTask"}
serve("embodied_rft/PegInsert-v0", **_peg, max_episode_steps=60)

for _name in ("Sum", "Countdown", "Format", "Jsonl"):
    serve(f"embodied_rft/Text{_name}-v0", f"{_TEXT}.batch:TextBatch", task=f"{_TEXT}.tasks:{_name}Task")
for _name in ("Sum", "Jsonl"):
    serve(f"embodied_rft/Tool{_name}-v0", f"{_TEXT}.tools:ToolBatch", task=f"{_TEXT}.tasks:{_name}Task")

_FILES = {
    "NumberLine": "number_line", "EZPoints": "points", "Points24": "points", "BlackJack": "black_jack",
    "GeneralPoints": "general_points", "TwentyFortyEight": "twenty_forty_eight", "ShisenSho": "shisen_sho",
    "Swap": "swap", "Sokoban": "sokoban", "FrozenLake": "frozen_lake",
}  # fmt: skip
for _name, _file in _FILES.items():
    serve(f"embodied_rft/{_name}-v0", f"{_GAMES}.batch:GameBatch", task=f"{_GAMES}.{_file}:{_name}")
    serve(f"embodied_rft/Told{_name}-v0", f"{_TURNS}.lifted:Lifted", of=f"embodied_rft/{_name}-v0")
serve("embodied_rft/Told-v0", f"{_TURNS}.lifted:Lifted")

_OTHERS: dict[str, tuple[str, dict[str, object]]] = {
    "BabyAI": ("grids:Grid", {"family": "BabyAI"}), "MiniGrid": ("grids:Grid", {"family": "MiniGrid", "expert": False}),
    "Arcade": ("arcade:Arcade", {}), "Crafter": ("crafting:Crafter", {}), "TextGame": ("text_games:TextGame", {}),
    "OpenEnv": ("open_env:OpenEnv", {}),
}  # fmt: skip
for _name, (_place, _fixed) in _OTHERS.items():
    gymnasium.register(f"embodied_rft/{_name}-v0", f"{_WORLDS}.{_place}", kwargs=_fixed)

serve("embodied_rft/ClickScreen-v0", f"{_GUI}.click_screen:ClickScreen")
serve("embodied_rft/Grounding-v0", f"{_GUI}.grounding:Grounding")
serve("embodied_rft/RecordedSteps-v0", f"{_GUI}.recorded:Recorded")
serve("embodied_rft/Desk-v0", f"{_GUI}.site:Pages", task=f"{_GUI}.desk.site:DeskSite")
