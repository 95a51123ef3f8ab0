"""Images are stored once, come back bit for bit, and are freed with their last reference: against plain copies."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied_rft.buffer.images import BlobStore, Images
from embodied_rft.data import Ragged

STORES = {
    "memory": lambda folder: BlobStore(),
    "compressed": lambda folder: BlobStore(compress=True),
    "disk": lambda folder: BlobStore(folder=folder),
    "compressed on disk": lambda folder: BlobStore(compress=True, folder=folder),
}


def image(value, shape=(4, 5, 3)):
    return np.random.default_rng(value).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(params=STORES)
def store(request, tmp_path):
    return STORES[request.param](tmp_path)


def test_the_same_content_is_stored_once(store):
    a, b, c = store.put(image(0)), store.put(image(0).copy()), store.put(image(1))
    assert a == b != c and len(store) == 2
    np.testing.assert_array_equal(store.get([c, a]), [image(1), image(0)])
    store.release([a])
    assert store.references(a) == 1
    store.release([b])
    assert store.references(a) == 0 and len(store) == 1
    with pytest.raises(ValueError, match="not stored"):
        store.get([a])
    store.release([c])
    assert store.nbytes == 0


def test_shape_belongs_to_the_content(store):
    flat, tall = store.put(np.zeros((2, 6), np.uint8)), store.put(np.zeros((6, 2), np.uint8))
    assert flat != tall
    assert [i.shape for i in store.get([flat, tall])] == [(2, 6), (6, 2)]


def test_a_view_is_stored_by_its_content(store):
    big = image(0, (8, 8, 3))
    assert store.put(big[::2, ::-1]) == store.put(big[::2, ::-1].copy())


@settings(max_examples=60, deadline=None)
@given(
    operations=st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(1, 40)), max_size=60),
    name=st.sampled_from(sorted(STORES)),
)
def test_any_order_of_puts_and_releases(operations, name, tmp_path_factory):
    store, held = STORES[name](tmp_path_factory.getbasetemp()), []  # held: (id, content) for each reference
    for is_put, value, width in operations:
        if is_put:
            content = image(value, (2, width))
            held.append((store.put(content), content))
        elif held:
            store.release([held.pop(value % len(held))[0]])
        for id, content in held:
            np.testing.assert_array_equal(store.get([id])[0], content)
    contents = {(c.shape, c.tobytes()) for _, c in held}
    assert len(store) == len(contents)
    assert sum(store.references(id) for id in {id for id, _ in held}) == len(held)
    restored = STORES[name](tmp_path_factory.getbasetemp())
    restored.load_state_dict(store.state_dict())
    for id, content in held:
        np.testing.assert_array_equal(restored.get([id])[0], content)
        restored.release([id])
    assert len(restored) == 0
    assert restored.put(image(99)) == store.put(image(99))  # ids go on where they were


def test_freed_space_on_disk_is_used_again(tmp_path):
    store = BlobStore(folder=tmp_path)
    for i in range(100):
        id = store.put(image(i, (40, 40)))
        store.release([id])
    assert store._end <= 4096
    assert not list(tmp_path.iterdir()) or len(list(tmp_path.iterdir())) <= 1


def test_compression_pays_for_drawn_screens():
    screen = np.zeros((210, 160, 3), np.uint8)
    screen[50:80, 20:60] = (200, 30, 30)
    plain, compressed = BlobStore(), BlobStore(compress=True)
    plain.put(screen)
    compressed.put(screen)
    assert compressed.nbytes * 50 < plain.nbytes == screen.nbytes


def test_features_are_computed_once_for_each_content():
    store, calls = BlobStore(cache_bytes=3 * 4 * 8), []

    def features(array):
        calls.append(array)
        return torch.full((8,), float(array.sum()))

    a, b = store.put(image(0)), store.put(image(1))
    images = Images(Ragged.of([[a, b], [], [a]]), store)
    result = images.cached(features)
    assert len(calls) == 2 and result[0][0] is result[2][0] and result[1] == []
    assert result[0][1][0] == image(1).sum()
    store.cached(a, features, name="other tower")
    assert len(calls) == 3
    for value in range(2, 6):  # pushes the oldest out
        store.cached(store.put(image(value)), features)
    store.cached(a, features)
    assert len(calls) == 8
    store.clear_cache()
    store.cached(a, features)
    assert len(calls) == 9


def test_images_of_a_batch_can_be_split():
    store = BlobStore()
    ids = [store.put(image(i)) for i in range(3)]
    images = Images(Ragged.of([[ids[0]], [ids[1], ids[2]], []]), store)
    assert [len(row) for row in images] == [1, 2, 0]
    assert [len(row) for row in images[1:]] == [2, 0]
    np.testing.assert_array_equal(images[np.array([1])].row(0), [image(1), image(2)])


def test_only_bytes_are_images():
    with pytest.raises(ValueError, match="image of float32"):
        BlobStore().put(np.zeros((2, 2), np.float32))
    with pytest.raises(ValueError, match="compress"):
        BlobStore().load_state_dict(BlobStore(compress=True).state_dict())
