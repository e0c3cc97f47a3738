"""Tasks: what a head learns, and how it is scored. Importing this files the tasks we ship."""

from heads.tasks import depth as _depth  # noqa: F401
from heads.tasks.base import TASKS, Task, TaskSettings, build_task

__all__ = ["TASKS", "Task", "TaskSettings", "build_task"]
