collect_ignore = ["report_ranks.py"]  # run by test_report.py
