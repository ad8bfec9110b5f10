-- How much run b is better than run a per bin of training instances, and how many categories gained or lost.
-- views: results
-- runs: a, b
-- options: bins
--
-- A category gained or lost if its AP moved by more than 0.001.
WITH paired AS (
    SELECT
        a.instance_count,
        a.AP AS ap_a,
        b.AP AS ap_b,
        CASE WHEN a.instance_count IS NOT NULL THEN 1 + len(list_filter(
            string_split(coalesce(getvariable('bins'), '10,100,1000'), ',')::BIGINT[],
            lambda edge: a.instance_count >= edge
        )) END AS bin
    FROM results AS a
    JOIN results AS b USING (category_id)
    WHERE a.run = getvariable('a') AND b.run = getvariable('b') AND a.AP >= 0 AND b.AP >= 0
)
SELECT
    bin,
    min(instance_count) AS fewest_instances,
    max(instance_count) AS most_instances,
    count(*) AS n,
    avg(ap_a) AS AP_a,
    avg(ap_b) AS AP_b,
    avg(ap_b - ap_a) AS difference,
    count(*) FILTER (ap_b - ap_a > 0.001) AS n_gained,
    count(*) FILTER (ap_b - ap_a < -0.001) AS n_lost
FROM paired
GROUP BY bin
ORDER BY bin;
