"""One-line errors of the command line."""

import pytest
from torch.utils.data import DataLoader

from corrzoo.parser import message_of


class Failing:
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise self.error


def raised_in_a_worker(error):
    with pytest.raises(type(error)) as caught:
        next(iter(DataLoader(Failing(error), num_workers=1)))
    return caught.value


def test_a_bug_in_a_worker_is_not_taken_for_too_little_memory():
    with pytest.raises(KeyError, match="the plugin's bug"):
        message_of(raised_in_a_worker(KeyError("the plugin's bug")))
    said = message_of(raised_in_a_worker(OSError(5, "Input/output error", "a.jpg")))
    assert said == "OSError: [Errno 5] Input/output error: 'a.jpg'"


@pytest.mark.parametrize("pids", ["(pid 7) is killed by signal: Killed.", "(pid(s) 7, 8) exited unexpectedly"])
def test_a_killed_worker_is_explained(pids):
    said = message_of(RuntimeError(f"DataLoader worker {pids}"))
    assert said.startswith(f"DataLoader worker {pids} The usual reason is too little memory: give fewer")
