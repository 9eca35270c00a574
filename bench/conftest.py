"""Limits the machine information in benchmark files to hardware and versions."""

# Import first: it sets how threads wait, which OpenMP reads when PyTorch loads.
import hrm  # noqa: F401


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json.get("commit_info", {}).pop("project", None)
    for benchmark in output_json["benchmarks"]:
        # Quartiles replace the thirty raw timings of each row.
        benchmark["stats"].pop("data", None)
