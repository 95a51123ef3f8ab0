// Begins an episode of a page of MiniWoB++. Its clock does not end it, and how the page stood is asked when it is answered,
// before anything of the page changes.
(seed, mode, solved) => {
  const end = core.endEpisode;
  core.endEpisode = (...said) => {
    if (core.EP_TIMER !== null) window.solved = solved(said[0]);
    end(...said);
  };
  core.EPISODE_MAX_TIME = 2 ** 31 - 1;
  core.setDataMode(mode);
  Math.seedrandom(seed);
  core.startEpisodeReal();
}
