"""Makes deploy/dashboards/dashboard.png: a real prefilld and a real decode worker under load, and a real Prometheus.

    python3 tests/deploy/dashboards_picture.py build/release/bin [OUT]

It takes some six minutes on two cores. The promise of perplexity in it is measured first, on parts of two READMEs.
"""

import subprocess
import sys
import time
from pathlib import Path

from alerts_processes import MODEL, ROOT, Prometheus, running, temporary_folder
from dashboards_load import Load, Shown

sys.path.insert(0, str(ROOT / "deploy" / "dashboards"))
import draw_dashboard  # noqa: E402

MINUTES = 4
BUSY = (
    *Load.KINDS,
    ("default", "share", 7000, 0.1),
    ("search", "share", 2500, 0.0),
    ("search", "dense", 3000, 0.0),
)


def calibrated_clusters(bin_dir: Path, folder: Path) -> Path:
    """Measures what the built-in thresholds cost on six prompts, and returns the cluster file that says so."""
    prompts = folder / "prompts"
    prompts.mkdir()
    text = (ROOT / "deploy" / "README.md").read_bytes() + (ROOT / "model" / "sparse" / "README.md").read_bytes()
    for i in range(6):
        (prompts / f"{i}.txt").write_bytes(text[5500 * i : 5500 * (i + 1)])
    out = folder / "clusters.json"
    command = [sys.executable, "-B", ROOT / "model" / "calibration" / "calibrate.py", "--prefilld", bin_dir / "prefilld",
               "--model", MODEL, "--device=cpu", "--max_perplexity_rise=0.02", "--out", out, prompts]  # fmt: skip
    subprocess.run(command, check=True)
    return out


def main() -> None:
    bin_dir = Path(sys.argv[1]).resolve()
    out = Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / "deploy" / "dashboards" / "dashboard.png"
    with temporary_folder() as folder:
        shown = Shown(bin_dir, folder, calibrated_clusters(bin_dir, folder))
        with Prometheus(folder / "prometheus", shown.servers, scrape_seconds=1) as prometheus, running(shown.servers):
            while len(prometheus.query("up == 1")) < len(shown.servers):
                time.sleep(0.1)
            with Load(shown) as load:
                time.sleep(60 * (MINUTES - 2))
            with Load(shown, BUSY) as busy:
                time.sleep(60)
            with Load(shown, seed=2) as after:
                time.sleep(60)
            assert not (load.errors + busy.errors + after.errors), load.errors + busy.errors + after.errors
            url = f"http://127.0.0.1:{prometheus.port}"
            source = draw_dashboard.Source(url, time.time(), 60 * MINUTES, "10s")
            draw_dashboard.draw(draw_dashboard.json.loads(draw_dashboard.DASHBOARD.read_text()), source, out)


if __name__ == "__main__":
    main()
