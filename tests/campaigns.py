"""The fault campaigns: `python tests/campaigns.py kill sigterm damage disk nan sweep --seed 0`.

Without names all of them, at full size: an hour or so. Each prints one line of JSON with what it saw; the exit code is
1 when something was not as it must be. `tests/test_faults.py` runs smaller ones.
"""

import argparse
import json
import os
import pathlib
import signal
import sys
import tempfile
import time
import traceback

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

# What runs in this process, too: one device, and every program from the cache.
from campaign_runs import environment

os.environ.update(environment())

import campaign_damage
import campaign_faults
import campaign_kill

CAMPAIGNS = {
    "kill": (100, lambda folder, count, seed: campaign_kill.runs(folder, count, 5, seed)),
    "sigterm": (30, lambda folder, count, seed: campaign_kill.runs(folder, count, 2, seed, signal.SIGTERM)),
    "damage": (200, campaign_damage.damages),
    "disk": (20, campaign_faults.full_disk),
    "nan": (20, campaign_faults.not_finite),
    "sweep": (20, campaign_kill.sweep),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="CAMPAIGN", help=", ".join(CAMPAIGNS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, help="in place of that of the full campaign")
    options = parser.parse_args()
    if unknown := set(options.names) - set(CAMPAIGNS):
        parser.error(f"there is no campaign {', '.join(sorted(unknown))}; choose from {', '.join(CAMPAIGNS)}")
    failed = 0
    for name in options.names or CAMPAIGNS:
        count, campaign = CAMPAIGNS[name]
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="gdn-") as folder:
            try:
                seen = campaign(pathlib.Path(folder), options.count or count, options.seed)
            except Exception:
                traceback.print_exc()
                seen, failed = {"failed": True}, 1
        print(json.dumps({"campaign": name, **seen, "seconds": round(time.monotonic() - began)}), flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
