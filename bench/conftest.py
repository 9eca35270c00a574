"""What a benchmark file says of its machine: the hardware and versions, not whose it is."""

# It sets how threads wait, which OpenMP reads when PyTorch loads.
import hrm  # noqa: F401


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json.get("commit_info", {}).pop("project", None)
    for benchmark in output_json["benchmarks"]:
        # Thirty raw timings a row say no more than their quartiles.
        benchmark["stats"].pop("data", None)
