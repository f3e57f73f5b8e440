"""Bytes and seconds of an exchange of gradients by two workers on loopback, float32 and bfloat16.

unshare --net sh -c 'ip link set lo up; python -m benchmarks.exchange'    # about two minutes

The formats take turns in the same two processes, and nothing else is computed. All bytes on the
loopback interface are counted, so the namespace keeps those of other programs out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.harness import ROOT, print_table, seconds_of, worker_environments, write_result
from research.system.environment import import_tensorflow

# Trained parameters, as `benchmarks.scaling` counts them.
PARAMETERS = {
    "MobileNetV2 from 100": 1_840_897,
    "VGG16 from block4": 12_979_713,
    "ResNet50V2 from conv5": 14_952_449,
}
TENSORS = 50
TURNS = 20
BYTES = {"float32": 4, "bfloat16": 2}  # per value


def exchange_in_turns(parameters: int) -> dict[str, dict[str, list[float]]]:
    """Exchanges random gradients with the other worker of TF_CONFIG.

    Returns:
      By format, `seconds` and `sent_bytes` of each turn after the first. The bytes are those that
      both workers sent.
    """
    import psutil
    import tensorflow as tf

    from research.loop.exchange import sum_gradients
    from research.system.cluster import find_cluster
    from research.system.team import join_cluster
    from research.tasks.task import Gradients

    cluster = find_cluster("multi_worker")
    assert cluster is not None
    strategy = join_cluster(cluster, 60)
    values = [tf.random.normal((parameters // TENSORS,)) for _ in range(TENSORS)]

    def compiled(exchange: str) -> Callable[[], Any]:
        @tf.function(autograph=False)
        def exchanged() -> tf.Tensor:
            def on_replica() -> tf.Tensor:
                gradients = Gradients(list(values), {"loss": tf.ones([])})
                summed = sum_gradients(gradients, exchange)
                return tf.add_n([tf.reduce_sum(value) for value in summed.values])

            return strategy.experimental_local_results(strategy.run(on_replica))[0]

        return lambda: exchanged().numpy()

    steps = {exchange: compiled(exchange) for exchange in BYTES}
    found: dict[str, dict[str, list[float]]] = {
        exchange: {"seconds": [], "sent_bytes": []} for exchange in BYTES
    }
    for turn in range(TURNS + 1):
        for exchange, step in steps.items():
            before = psutil.net_io_counters(pernic=True)["lo"].bytes_sent
            seconds = seconds_of(step)
            sent = psutil.net_io_counters(pernic=True)["lo"].bytes_sent - before
            if turn:
                found[exchange]["seconds"].append(seconds)
                found[exchange]["sent_bytes"].append(sent)
    return found


def measure(parameters: int) -> dict[str, dict[str, list[float]]]:
    """Starts two workers and returns what `exchange_in_turns` returns in the first."""
    command = [sys.executable, "-m", "benchmarks.exchange", f"--parameters={parameters}"]
    workers = [
        subprocess.Popen(
            command,
            env={**environment, "TF_NUM_INTRAOP_THREADS": "1"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for environment in worker_environments(2)
    ]
    outputs = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise RuntimeError(f"workers ended with {[worker.returncode for worker in workers]}")
    return json.loads(outputs[0].splitlines()[-1])


def main() -> None:
    """Measures, prints and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=int, help="be a worker; print JSON")
    arguments = parser.parse_args()
    import_tensorflow()
    if arguments.parameters:
        print(json.dumps(exchange_in_turns(arguments.parameters)))
        return
    rows: list[dict[str, Any]] = []
    for name, parameters in PARAMETERS.items():
        found = measure(parameters)
        pairs = zip(found["float32"]["seconds"], found["bfloat16"]["seconds"], strict=True)
        ratio = statistics.median(bfloat16 / float32 for float32, bfloat16 in pairs)
        for exchange, size in BYTES.items():
            sent = statistics.mean(found[exchange]["sent_bytes"])
            rows.append(
                {
                    "gradients of": name,
                    "exchange": exchange,
                    "predicted_bytes": 2 * size * parameters,
                    "counted_over_predicted": sent / (2 * size * parameters),
                    "median_seconds": statistics.median(found[exchange]["seconds"]),
                    "bfloat16_over_float32": ratio,
                }
            )
    print_table(rows)
    write_result("exchange", {"exchanges": rows})


if __name__ == "__main__":
    main()
