"""From a request to a job, and from the job's result to the response."""
