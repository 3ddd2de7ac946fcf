"""KuaiRand-Pure: short-video impressions of Kuaishou with their feedback.

The folder holds timed events of 2022-04-24 to 05-08 (``events_*.csv.gz``), per user the last
videos of the weeks before (``earlier_sequences.jsonl.gz``), and side features.

Times of the earlier sequences are not recorded; only the time of the last one is. Each earlier
behaviour gets that time: an upper bound, the only fact there is. Their order is kept, no gap is
invented, and ``timed_N`` is False for them. They precede every timed event of the same user.
"""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import numpy as np

from gr_hstu.data.interactions import Interactions, Table

ATTRIBUTION = (
    "KuaiRand-Pure. Chongming Gao, Shijun Li, Yuan Zhang, Jiawei Chen, Biao Li, Wenqiang Lei, "
    "Peng Jiang, Xiangnan He: KuaiRand: An Unbiased Sequential Recommendation Dataset with "
    "Randomly Exposed Videos. CIKM 2022. https://kuairand.com"
)
LICENCE = "CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/)"

# Beijing time, in which the dataset's days and hours are counted; China has no summer time.
UTC_OFFSET_MS = 8 * 3_600_000

USER_COLUMNS = (
    "user_active_degree",
    "is_live_streamer",
    "is_video_author",
    "follow_user_num_range",
    "fans_user_num_range",
    "friend_user_num_range",
    "register_days_range",
    *(f"onehot_feat{i}" for i in (0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11)),
)


def read(folder: Path) -> Interactions:
    """Earlier and timed events, exact duplicate rows dropped.

    Signals ``is_clicked``, ``is_long_view``, ``is_liked`` (0 or 1), ``watch_percentage`` (0 to 1)
    and ``watch_duration`` (seconds); for earlier events only the second and third are known.
    Context ``tab`` (the app's page, -1 for earlier events).
    """
    (events_path,) = sorted(folder.glob("events_*.csv.gz"))
    with gzip.open(events_path, "rt", encoding="ascii", newline="") as file:
        reader = csv.reader(file)
        names = next(reader)
        rows = list(dict.fromkeys(map(tuple, reader)))
    table = np.array(rows, dtype=np.int64)
    column = {name: table[:, i] for i, name in enumerate(names)}

    user, video, time_ms, long_view, like = [], [], [], [], []
    with gzip.open(folder / "earlier_sequences.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            liked, viewed = set(record["like_seq"]), set(record["long_watch_seq"])
            for item in record["watch_seq"]:
                user.append(record["user_id"])
                video.append(item)
                time_ms.append(record["last_time_ms"])
                long_view.append(item in viewed)
                like.append(item in liked)

    earlier, timed = len(user), len(table)
    unknown = np.full(earlier, np.nan, np.float32)
    watched = np.minimum(column["play_time_ms"] / np.maximum(column["duration_ms"], 1), 1.0)

    def both(before: object, after: np.ndarray, dtype: type) -> np.ndarray:
        return np.concatenate([np.asarray(before, dtype), after.astype(dtype)])

    licence_file = folder / "LICENSE"
    users = _users(folder / "user_features.csv.gz")
    items = _items(folder / "video_features_basic.csv.gz")
    return Interactions.sort(
        Interactions(
            name="kuairand-pure",
            user_N=_index(both(user, column["user_id"], np.int64), users.ids, "user_id"),
            item_N=_index(both(video, column["video_id"], np.int64), items.ids, "video_id"),
            timestamp_ms_N=both(time_ms, column["time_ms"], np.int64),
            signals={
                "is_clicked": both(unknown, column["is_click"], np.float32),
                "is_long_view": both(long_view, column["long_view"], np.float32),
                "is_liked": both(like, column["is_like"], np.float32),
                "watch_percentage": both(unknown, watched, np.float32),
                "watch_duration": both(unknown, column["play_time_ms"] / 1000, np.float32),
            },
            context={"tab": both(np.full(earlier, -1), column["tab"], np.int64)},
            timed_N=np.arange(earlier + timed) >= earlier,
            users=users,
            items=items,
            attribution=ATTRIBUTION,
            licence=LICENCE,
            licence_text=licence_file.read_text("utf-8") if licence_file.is_file() else "",
        )
    )


def _index(values: np.ndarray, ids: tuple[str, ...], name: str) -> np.ndarray:
    known = np.array([int(i) for i in ids], np.int64)
    position = np.searchsorted(known, values)
    if (known[np.minimum(position, len(known) - 1)] != values).any():
        raise ValueError(f"{name}: an event names an id that the feature file does not hold")
    return position.astype(np.int64) + 1


def _rows(path: Path, key: str) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return sorted(csv.DictReader(file), key=lambda row: int(row[key]))


def _users(path: Path) -> Table:
    rows = _rows(path, "user_id")
    features = {name: np.array([row[name] for row in rows]) for name in USER_COLUMNS}
    return Table(tuple(row["user_id"] for row in rows), features=features)


def _items(path: Path) -> Table:
    rows = _rows(path, "video_id")
    seconds = np.array([float(r["video_duration"] or "nan") / 1000 for r in rows], np.float32)
    titles = tuple(
        " · ".join(
            [f"video {row['video_id']}"]
            + ([f"{s:.0f} s"] if np.isfinite(s) else [])
            + ([f"tag {row['tag']}"] if row["tag"] else [])
        )
        for row, s in zip(rows, seconds, strict=True)
    )
    uploaded = np.array([r["upload_dt"] for r in rows], dtype="datetime64[D]").astype(np.int64)
    features: dict[str, np.ndarray] = {
        "duration": seconds,
        "tag": np.array([r["tag"].split(",")[0] for r in rows]),
        "author": np.array([r["author_id"] for r in rows]),
        "video_type": np.array([r["video_type"] for r in rows]),
        "upload_type": np.array([r["upload_type"] for r in rows]),
        "music_type": np.array([r["music_type"] for r in rows]),
        "upload_day": uploaded.astype(np.float32),
        "aspect": np.array([_aspect(r["server_width"], r["server_height"]) for r in rows]),
    }
    return Table(tuple(row["video_id"] for row in rows), titles, features)


def _aspect(width: str, height: str) -> str:
    w, h = float(width or 0), float(height or 0)
    if not w or not h:
        return ""
    return "wide" if w > h else "tall" if h >= 1.5 * w else "square"
