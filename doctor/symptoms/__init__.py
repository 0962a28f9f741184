"""Symptoms: pure functions from a history to typed facts. A symptom measures; a rule judges."""
