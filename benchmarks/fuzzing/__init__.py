"""The parts of `fuzz_campaign.py`."""
