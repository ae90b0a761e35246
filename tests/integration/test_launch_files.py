"""The launches that are shipped: read as what will run them reads them, and agreeing with the code."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from torchtitan_lite.config.schema import JobConfig

FOLDER = Path(__file__).parents[2] / "launch"
SCRIPTS = ["bare_nodes.sh", "slurm.sbatch"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_sound_shell(name: str) -> None:
    assert subprocess.run(["bash", "-n", str(FOLDER / name)]).returncode == 0
    assert (FOLDER / name).stat().st_mode & 0o111


def test_bare_nodes_says_how_it_is_used() -> None:
    for arguments in ([], ["node"], ["node", "host:1", "1:2"]):
        run = subprocess.run([str(FOLDER / "bare_nodes.sh"), *arguments], capture_output=True, text=True, timeout=60)
        assert run.returncode == 2
        assert run.stderr.startswith("usage: ")


def test_slurm_signals_in_time_for_a_save() -> None:
    text = (FOLDER / "slurm.sbatch").read_text()
    (seconds,) = re.findall(r"^#SBATCH --signal=B:USR1@(\d+)$", text, flags=re.MULTILINE)
    assert int(seconds) > 2 * JobConfig().elastic.grace_seconds
    assert "#SBATCH --requeue\n" in text


def test_slurm_passes_the_signal_on_waits_and_goes_back_into_the_queue(tmp_path: Path) -> None:
    """With stand-ins for Slurm's commands: a step that a signal ends a second later, with the launcher's code."""
    commands = {
        "srun": "trap 'sleep 1; echo saved >> told; exit 138' USR1; echo ready >> told; while :; do sleep 0.1; done",
        "scontrol": '[ "$1" = show ] && echo node0 || echo "$@" >> told',
    }
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "77"}
    environment |= {"SLURM_JOB_NODELIST": "node0", "SLURM_NNODES": "1"}
    script = [str(FOLDER / "slurm.sbatch"), "recipe.toml"]
    signal_it = "import os, signal, sys, time; time.sleep(1.5); os.kill(int(sys.argv[1]), signal.SIGUSR1)"
    process = subprocess.Popen(script, env=environment, stdout=subprocess.PIPE, text=True)
    subprocess.run([sys.executable, "-c", signal_it, str(process.pid)], check=True)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 138
    assert (tmp_path / "told").read_text().splitlines() == ["ready", "saved", "requeue 77"]
    assert "back into the queue" in out


def _documents() -> dict[str, dict[str, Any]]:
    return {each["kind"]: each for each in yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())}


def test_kubernetes_leaves_time_to_save_and_meets_outside_the_workers() -> None:
    documents = _documents()
    job = documents["PyTorchJob"]["spec"]
    pod = job["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > JobConfig().elastic.grace_seconds + 2
    (container,) = pod["containers"]
    variables = {each["name"]: each["value"] for each in container["env"]}
    policy = job["elasticPolicy"]
    assert variables["NNODES"] == f"{policy['minReplicas']}:{policy['maxReplicas']}"
    service = documents["Service"]
    (port,) = service["spec"]["ports"]
    assert variables["RDZV_ENDPOINT"] == f"{service['metadata']['name']}:{port['port']}"
    store = documents["Deployment"]["spec"]["template"]
    assert service["spec"]["selector"] == store["metadata"]["labels"]
    assert store["spec"]["containers"][0]["command"][:2] == ["torchtitan-lite", "rendezvous"]


def test_kubernetes_names_a_recipe_that_is_there() -> None:
    (container,) = _documents()["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    assert (FOLDER.parent / container["command"][1]).is_file()
