"""Write docs/leaderboard.*, as `corrzoo leaderboard` does; --check verifies them instead.

python benchmarks/leaderboard.py [--check]
"""

import sys

from corrzoo.__main__ import main

if __name__ == "__main__":
    main(["leaderboard", *sys.argv[1:]])
