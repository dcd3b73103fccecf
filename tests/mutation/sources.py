"""The files that are mutated, each a decision that is computed without a device, and the tests that belong to them."""

SOURCES: dict[str, tuple[str, ...]] = {
    "popax/population/optimizer.py": ("tests/population/test_schedule.py", "tests/population/test_optimizer.py"),
    "popax/population/early_stop.py": ("tests/population/test_early_stop.py",),
    "popax/population/bounds.py": ("tests/population/test_budgets.py",),
    "popax/data/packing.py": ("tests/data/test_packing.py",),
    "popax/data/pipeline.py": ("tests/data/test_pipeline.py",),
    "popax/data/users.py": ("tests/data/test_users.py",),
    "popax/serving/fairness.py": ("tests/serving/test_fairness.py",),
    "popax/serving/scheduler.py": ("tests/serving/test_scheduler.py",),
    "popax/serving/pages.py": ("tests/serving/test_pages.py",),
    "popax/evaluation/gate.py": ("tests/evaluation/test_gate.py",),
}
