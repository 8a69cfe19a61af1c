"""The version of HCCL: CANN's."""

__sys_version__ = "8.1"
