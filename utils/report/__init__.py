"""One self-contained HTML page of a run or of a table of sets."""

from utils.report.charts import check_installed
from utils.report.page import write_run_page, write_table_page
from utils.report.run import RunReport, Sources
