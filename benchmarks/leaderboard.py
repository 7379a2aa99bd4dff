"""Write the README's leaderboard and docs/leaderboard.*, as `corrzoo leaderboard`; --check says if they are true.

python benchmarks/leaderboard.py [--check]
"""

import sys

from corrzoo.__main__ import main

if __name__ == "__main__":
    main(["leaderboard", *sys.argv[1:]])
