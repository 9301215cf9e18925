"""Reasoning tasks with exact graders, for measuring and for teaching."""
