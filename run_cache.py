"""Lists the files that runs keep for later runs, and removes those that are no longer needed.

python run_cache.py                          # lists them
python run_cache.py --unused_days=30         # removes what no run used for 30 days
python run_cache.py --keep_gigabytes=0       # removes everything
"""

from flags.command_line import run
from research.settings.program_configs import CacheConfig


def main(config: CacheConfig) -> None:
    """Lists or removes entries of the caches."""
    from research.data.cache_report import tidy

    tidy(config.cache_dir, config.unused_days, config.keep_gigabytes)


if __name__ == "__main__":
    run(CacheConfig, main)
