"""Tasks: what a head learns, and how it is scored. Importing this files the tasks we ship."""

from heads.tasks import boundaries as _boundaries  # noqa: F401
from heads.tasks import classification as _classification  # noqa: F401
from heads.tasks import depth as _depth  # noqa: F401
from heads.tasks import detection as _detection  # noqa: F401
from heads.tasks import distance as _distance  # noqa: F401
from heads.tasks import instances as _instances  # noqa: F401
from heads.tasks import pose as _pose  # noqa: F401
from heads.tasks import segmentation as _segmentation  # noqa: F401
from heads.tasks.base import TASKS, LabelFacts, Task, TaskSettings, build_task

__all__ = ["TASKS", "LabelFacts", "Task", "TaskSettings", "build_task"]
