"""Images are stored once, come back bit for bit, and are freed with their last reference: against plain copies."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied_rft.buffer.images import BlobStore


def image(value, shape=(4, 5, 3)):
    return np.random.default_rng(value).integers(0, 256, shape, dtype=np.uint8)


def test_the_same_content_is_stored_once():
    store = BlobStore()
    a, b, c = store.put(image(0)), store.put(image(0).copy()), store.put(image(1))
    assert a == b != c and len(store) == 2
    np.testing.assert_array_equal(store.get([c, a]), [image(1), image(0)])
    store.release([a])
    assert len(store) == 2
    store.release([b])
    assert len(store) == 1
    with pytest.raises(ValueError, match="not stored"):
        store.get([a])
    store.release([c])
    assert store.nbytes == 0


def test_shape_belongs_to_the_content():
    store = BlobStore()
    flat, tall = store.put(np.zeros((2, 6), np.uint8)), store.put(np.zeros((6, 2), np.uint8))
    assert flat != tall
    assert [i.shape for i in store.get([flat, tall])] == [(2, 6), (6, 2)]


def test_a_view_is_stored_by_its_content():
    store = BlobStore()
    big = image(0, (8, 8, 3))
    assert store.put(big[::2, ::-1]) == store.put(big[::2, ::-1].copy())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(1, 40)), max_size=60))
def test_any_order_of_puts_and_releases(operations):
    store, held = BlobStore(), []  # held: (id, content) for each reference
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
    restored = BlobStore()
    restored.load_state_dict(store.state_dict())
    for id, content in held:
        np.testing.assert_array_equal(restored.get([id])[0], content)
        restored.release([id])
    assert len(restored) == 0
    assert restored.put(image(99)) == store.put(image(99))  # ids go on where they were


def test_only_bytes_are_images():
    with pytest.raises(ValueError, match="image of float32"):
        BlobStore().put(np.zeros((2, 2), np.float32))


def test_what_is_read_cannot_be_changed():
    store, given = BlobStore(), image(0)
    id = store.put(given)
    given[:] = 0
    with pytest.raises(ValueError, match="read-only"):
        store.get([id])[0][:] = 0
    np.testing.assert_array_equal(store.get([id])[0], image(0))


def test_beside_its_pictures_a_store_takes_next_to_nothing():
    pictures = [image(number % 100, (64, 64, 3)) for number in range(300)]
    tracemalloc.start()
    store = BlobStore()
    ids = [store.put(picture) for picture in pictures]
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(ids)) == 100 and store.nbytes == 100 * 64 * 64 * 3
    assert held <= 1.1 * store.nbytes
