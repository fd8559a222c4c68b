"""`report.html`: one self-contained page about one run, for people who were not there."""
