"""One environment from its id: finding it, the package that it comes in, its options and its wrappers.

Boundary: knows Gymnasium and which public packages hold which ids; steps nothing. Pools, films and checks make their
environments here, so that all of them see the same one.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import gymnasium
from gymnasium import wrappers as gymnasium_wrappers
from gymnasium.envs.registration import EnvSpec

from embodied_rft.names import UserError, nearest
from embodied_rft.pools.incidents import describe_error
from embodied_rft.registry import load_plugins

# Ids that begin so are registered when the module is imported, which the package brings.
PACKAGES: tuple[tuple[str, str, str], ...] = (
    (r"ALE/", "ale_py", "ale-py"),
    (r"MiniGrid-|BabyAI-", "minigrid", "minigrid"),
    (r"Meta-World/", "metaworld", "metaworld"),
    (r"gym_pusht/", "gym_pusht", "gym-pusht"),
    (r"gym_aloha/", "gym_aloha", "gym-aloha"),
    (r"gym_xarm/", "gym_xarm", "gym-xarm"),
    (r"Panda\w+-v\d", "panda_gym", "panda-gym"),
    (r"(Fetch|Hand|Adroit)\w+-v\d|AntMaze|PointMaze|FrankaKitchen", "gymnasium_robotics", "gymnasium-robotics"),
    (r"highway|merge-v|roundabout-v|parking|intersection-v|racetrack", "highway_env", "highway-env"),
    (r"myo[A-Z]\w+-v\d", "myosuite", "myosuite"),
    (r"flappy|FlappyBird", "flappy_bird_gymnasium", "flappy-bird-gymnasium"),
    (r"dm_control/", "shimmy", "shimmy[dm-control]"),
    (r"procgen", "procgen", "procgen"),
)  # fmt: skip

REFUSED_WRAPPERS = {
    "Autoreset": "the pool resets environments itself",
    "NormalizeObservation": "every copy of the environment would keep statistics of its own, and evaluation would "
    "begin with none: use the agent's option `normalize`",
    "NormalizeReward": "every copy of the environment would keep statistics of its own, and returns of evaluations "
    "would no longer be the environment's: use an option of the objective",
    "RecordVideo": "the run films episodes for its report",
    "HumanRendering": "nobody looks at a run's environments",
    "RenderCollection": "nobody collects its frames",
    "vector": "it is a module of wrappers of vector environments; recipes wrap single ones",
}


# --- ids -------------------------------------------------------------------------------------------------------------


def find_spec(id: str | EnvSpec) -> EnvSpec:
    """The registered specification of an environment id; ValueError with the package to install or the nearest id.

    "package.module:Id-v0" imports the module first, as `gymnasium.make` does. Installed packages that are known to
    register ids are imported when one of theirs is asked for.
    """
    if isinstance(id, EnvSpec):
        return id
    module, _, name = id.rpartition(":")
    if module:
        _import_module(module, id)
    if name not in gymnasium.registry:
        load_plugins()
    if name not in gymnasium.registry and (known := _package_of(name)) is not None:
        module, package = known
        if importlib.util.find_spec(module) is None:
            raise UserError(f"environment {name!r} comes with the package {package}: pip install '{package}'")
        importlib.import_module(module)
    if name not in gymnasium.registry:
        hint = nearest(name, gymnasium.registry)
        raise UserError(
            f"unknown environment {name!r}{f'; {hint}' if hint.startswith('did') else '.'} One of another package is "
            "known once its module is imported: write the id as 'module:Id', or list the module under plugins."
        )
    return gymnasium.spec(name)


def _package_of(name: str) -> tuple[str, str] | None:
    return next(((module, package) for prefix, module, package in PACKAGES if re.match(prefix, name)), None)


def _import_module(module: str, id: str) -> None:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise UserError(f"{id!r} needs the module {error.name!r}, which is not installed") from error
        raise UserError(f"environment {id!r}: no module {module!r} is installed or in the current folder") from error


def make_single(
    id: str | EnvSpec,
    *,
    options: Mapping[str, Any] | None = None,
    wrappers: Sequence[Mapping[str, Any]] = (),
    render_mode: str | None = None,
) -> gymnasium.Env:
    """One environment, wrapped as a recipe says.

    Args:
        id: a registered id, or its specification.
        options: constructor arguments.
        wrappers: innermost first, each {"id": name or "module:Class", **its options}. A TimeLimit replaces the one that
            the environment is registered with.
        render_mode: as of `gymnasium.make`.

    Raises:
        ValueError: what is unknown, refused or not installed.
    """
    spec = find_spec(id)
    given = {"disable_env_checker": True, **(options or {})}  # `answers` holds every answer against the spaces
    if render_mode is not None:
        given["render_mode"] = render_mode
    if any(wrapper["id"] == "TimeLimit" for wrapper in wrappers):
        given["max_episode_steps"] = -1
    try:
        env = gymnasium.make(spec, **given)
    except TypeError as error:
        raise UserError(f"environment {spec.id!r} refused its options {dict(options or {})}: {error}") from error
    except (gymnasium.error.DependencyNotInstalled, ImportError) as error:
        raise UserError(f"environment {spec.id!r} needs a package that is not installed: {error}") from error
    except SystemExit as error:
        raise UserError(f"environment {spec.id!r} could not be made: {describe_error(error)}") from error
    for wrapper in wrappers:
        env = _wrap(env, wrapper)
    return env


# --- wrappers --------------------------------------------------------------------------------------------------------


def find_wrapper(id: str) -> type[gymnasium.Wrapper]:
    """Gymnasium's wrapper of that name, or a third party's as "module:Class"; ValueError with the nearest name."""
    if id in REFUSED_WRAPPERS:
        raise UserError(f"the wrapper {id!r} cannot be used in a recipe: {REFUSED_WRAPPERS[id]}")
    module, _, name = id.rpartition(":")
    if module:
        _import_module(module, id)
        found = getattr(importlib.import_module(module), name, None)
        names = [n for n, v in vars(importlib.import_module(module)).items() if _is_wrapper(v)]
    else:
        names = [n for n in gymnasium_wrappers.__all__ if n not in REFUSED_WRAPPERS]
        found = getattr(gymnasium_wrappers, name) if name in names else None
    if not _is_wrapper(found):
        raise UserError(
            f"unknown wrapper {id!r}; {nearest(name, names)} One of your own is written 'module:Class', a subclass of "
            "gymnasium.Wrapper."
        )
    return cast(type[gymnasium.Wrapper], found)


def _is_wrapper(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, gymnasium.Wrapper)


def check_wrapper(wrapper: Mapping[str, Any]) -> None:
    """Whether the wrapper exists and takes these options; ValueError with the nearest option."""
    if not isinstance(wrapper, Mapping) or not isinstance(wrapper.get("id"), str):
        raise UserError(f"a wrapper is written {{id: TimeLimit, max_episode_steps: 200}}; got {wrapper!r}")
    parameters = list(inspect.signature(find_wrapper(wrapper["id"])).parameters.values())[1:]  # the first is env
    named = {p.name: p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    options = {key: value for key, value in wrapper.items() if key != "id"}
    for key in options:
        if key not in named and not any(p.kind is p.VAR_KEYWORD for p in parameters):
            raise UserError(f"the wrapper {wrapper['id']} has no option {key!r}; {nearest(key, named)}")
    missing = [name for name, p in named.items() if p.default is p.empty and name not in options]
    if missing:
        raise UserError(f"the wrapper {wrapper['id']} needs the option {missing[0]!r}")


def check_wrappers(wrappers: Sequence[Mapping[str, Any]]) -> None:
    """All of a list; the message begins with the place: "wrappers.0: ..."."""
    for index, wrapper in enumerate(wrappers):
        try:
            check_wrapper(wrapper)
        except ValueError as error:
            raise UserError(f"wrappers.{index}: {error}") from None


def _wrap(env: gymnasium.Env, wrapper: Mapping[str, Any]) -> gymnasium.Env:
    check_wrapper(wrapper)
    options = {key: value for key, value in wrapper.items() if key != "id"}
    try:
        return find_wrapper(wrapper["id"])(env, **options)
    except Exception as error:
        raise UserError(
            f"the wrapper {wrapper['id']} with {options} does not fit the environment (observations "
            f"{env.observation_space}, actions {env.action_space}): {describe_error(error)}"
        ) from error
