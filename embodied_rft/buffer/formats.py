"""Recognises files of other programs that were given in place of our own, by their first bytes, and names their reader.

Boundary: a path in, a sentence out; nothing of the file is interpreted.
"""

from __future__ import annotations

from pathlib import Path

SIGNATURES = (  # first bytes, what it is and who writes such, what reads it
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (robomimic, Minari, D4RL and ManiSkill write such)", "h5py.File(path)"),
    (b"PAR1", "a Parquet file (LeRobot data sets and Hugging Face write such)", "pandas.read_parquet(path)"),
    (b"ARROW1", "an Arrow file (Hugging Face data sets)", "datasets.Dataset.from_file(path)"),
    (b"\x93NUMPY", "a NumPy array", "numpy.load(path)"),
    (b"PK\x03\x04", "a zip archive (NumPy's npz, a PyTorch or SB3 model, or a packed folder)", "numpy.load or zipfile"),
    (b"\x1f\x8b", "a gzip archive (tar.gz, json.gz)", "tarfile.open(path) or gzip.open(path)"),
    (b"(\xb5/\xfd", "a Zstandard archive", "the package zstandard"),
    (b"SQLite format 3\x00", "an SQLite database", "sqlite3.connect(path)"),
    (b"{", "a JSON file", "json.load"),
    (b"[", "a JSON file", "json.load"),
)
PICKLES = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
FOLDERS = (  # a file that tells what a folder holds
    ("meta/info.json", "a LeRobot data set", "lerobot.datasets.lerobot_dataset.LeRobotDataset"),
    ("data/main_data.hdf5", "a Minari data set", "minari.MinariDataset(folder)"),
    (".zgroup", "a Zarr group (Diffusion Policy's data sets)", "zarr.open(folder)"),
    ("zarr.json", "a Zarr group", "zarr.open(folder)"),
)


def recognise(path: str | Path) -> str | None:
    """A phrase such as "an HDF5 file (...), which h5py.File(path) reads"; None for what is not known here."""
    path = Path(path)
    if path.is_dir():
        return next((f"{what}, which {reader} reads" for sign, what, reader in FOLDERS if (path / sign).exists()), None)
    with open(path, "rb") as file:
        start = file.read(16)
    if _is_safetensors(start, path.stat().st_size):
        return None  # our own form, whatever the length of its header looks like
    if start.startswith(PICKLES):
        return "a pickle, which is never loaded here: it may run any code"
    return next((f"{what}, which {reader} reads" for sign, what, reader in SIGNATURES if start.startswith(sign)), None)


def _is_safetensors(start: bytes, size: int) -> bool:
    """Eight bytes of a length that fits into the file, then JSON of that length."""
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size - 8
