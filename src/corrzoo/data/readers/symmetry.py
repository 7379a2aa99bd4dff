"""Parts of an object that a mirror swaps, and parts that look alike, by the datasets' own numbers of keypoints."""

_SPAIR71K = {
    "aeroplane": "4-5 6-7 8-9 10-11 12-13 14-15 16-17 18-19 20-21",
    "bicycle": "2-3 6-7 9-10",
    "bird": "1-2 4-5 7-8 10-11 12-13 14-15",
    "boat": "1-2 3-4 5-6 7-8 9-10 11-12",
    "bottle": "0-1 2-3 4-5 6-7 8-9",
    "bus": "0-1 2-3 5-6 10-20 13-23 11-21 14-24 12-22 15-25 16-17 26-27 18-19 28-29",
    "car": "0-1 2-3 6-7 10-20 13-23 11-21 14-24 12-22 15-25 16-17 26-27 18-19 28-29",
    "cat": "0-1 2-3 4-5 6-7 9-10 11-12",
    "chair": "0-1 2-3 4-5 6-7 8-9 10-11 12-13",
    "cow": "0-1 2-3 4-5 6-7 9-10 11-12 15-16 17-18 19-20",
    "dog": "0-1 2-3 4-5 9-10 11-12",
    "horse": "0-1 2-3 4-5 6-7 10-11 12-13 16-17 18-19",
    "motorbike": "0-1 2-3",
    "person": "0-1 2-3 8-9 10-11 12-13 14-15 16-17 18-19",
    "pottedplant": "0-2 4-5 6-8",
    "sheep": "0-1 2-3 4-5 6-7 9-10 11-12 15-16 17-18 19-20",
    "train": "0-1 2-3 4-5 6-7 8-9 10-11 12-13 14-15 16-17",
    "tvmonitor": "0-2 4-6 3-7 8-10 12-14 11-15",
}
_SPAIR71K_GROUPS = _SPAIR71K | {  # in the other categories, the groups are the pairs
    "bird": "1-2 10-11 12-13 14-15",
    "bus": "0-1 2-3-5-6 4-7 10-13-20-23 11-14-21-24 12-15-22-25 16-17-26-27 18-19-28-29",
    "car": "0-1 2-3-6-7 4-8 5-9 10-13-20-23 11-14-21-24 12-15-22-25 16-17-26-27 18-19-28-29",
    "cat": "2-3 9-10-11-12",
    "chair": "0-1 2-3 4-5-6-7 8-9 10-11 12-13",
    "cow": "2-3 9-10-11-12 15-16-17-18 19-20",
    "dog": "2-3 9-10-11-12",
    "horse": "2-3 10-11-12-13 16-17-18-19",
    "person": "8-9 10-11 12-13 14-15 16-17 18-19",
    "pottedplant": "0-1-2-3 4-5 6-8",
    "sheep": "2-3 9-10-11-12 15-16-17-18 19-20",
    "tvmonitor": "0-2-4-6 1-3-5-7 8-10-12-14 9-11-13-15",
}


def _groups(text: str) -> list[tuple[int, ...]]:
    """Groups of numbers from "0-1 2-3-5-6"."""
    return [tuple(map(int, group.split("-"))) for group in text.split()]


SPAIR71K = {category: _groups(text) for category, text in _SPAIR71K.items()}
"""A category's parts that are not named keep their number, such as an animal's nose. The eyes of animals are pairs."""
AP10K = {"*": _groups("0-1 5-8 6-9 12-15 7-10 13-16 11-14")}
"""The 17 keypoints of all species: eyes, shoulders, elbows and front paws, hips, knees and back paws."""
SPAIR71K_GROUPS = {category: _groups(text) for category, text in _SPAIR71K_GROUPS.items()}
AP10K_GROUPS = {"*": _groups("5-8 6-9-12-15 7-10-13-16 11-14")}
