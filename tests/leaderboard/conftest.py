"""Rankings of made-up result files."""

import json

import pytest

from corrzoo.leaderboard.results import find_results, rank, read_results


@pytest.fixture
def board(tmp_path):
    """Write results into a study's folder and rank them."""

    def make(*results, papers=(), study="study"):
        for i, content in enumerate(results):
            path = tmp_path / study / f"{i}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(content))
        return rank(read_results(find_results([tmp_path]), pytest.fail), papers)

    return make
