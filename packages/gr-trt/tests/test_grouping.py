"""Groups of a batch: everyone once, bounded padding, nothing too large."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gr_trt.execution.grouping import FREE_WORK, MAX_PADDING, Size, grouped

WIDTH = 64
SIZES = st.lists(st.builds(Size, st.integers(1, 3000), st.integers(1, 3000)), max_size=40)


@given(SIZES, st.integers(1, 10_000_000))
def test_groups(sizes: list[Size], room: int) -> None:
    def fits(count: int, size: Size) -> bool:
        return count * size.rows * size.keys <= room

    groups = grouped(sizes, WIDTH, fits)
    assert sorted(i for group in groups for i in group) == list(range(len(sizes)))
    for group in groups:
        padded = Size(max(sizes[i].rows for i in group), max(sizes[i].keys for i in group))
        needed = sum(sizes[i].work(WIDTH) for i in group)
        assert len(group) == 1 or fits(len(group), padded)
        padding = len(group) * padded.work(WIDTH) - needed
        assert padding <= max(MAX_PADDING * needed, FREE_WORK)


def test_similar_requests_go_together_and_a_long_one_by_itself() -> None:
    sizes = [Size(100, 120), Size(2000, 2100), Size(110, 110), Size(90, 100)]
    groups = grouped(sizes, WIDTH, lambda *_: True)
    assert sorted(map(sorted, groups)) == [[0, 2, 3], [1]]
