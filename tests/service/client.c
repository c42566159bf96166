/* A client made of what gdbus-codegen generates from the contract: reads, calls, follows a job, and waits for a signal. */
#include "jindisk1.h"
#include <stdio.h>

static GMainLoop *loop;
static guint64 last;

static void appended(JindiskAudit *audit, guint64 number, gpointer data) {
    (void)audit; (void)data;
    printf("appended %" G_GUINT64_FORMAT "\n", number);
    g_main_loop_quit(loop);
}

static gboolean late(gpointer data) {
    (void)data;
    g_printerr("no signal came\n");
    exit(3);
}

static void check(GError *error) {
    if (error == NULL)
        return;
    char *name = g_dbus_error_get_remote_error(error);
    g_printerr("%s: %s\n", name ? name : "?", error->message);
    exit(2);
}

static GVariant *none(void) {
    return g_variant_new("a{sv}", NULL);
}

int main(int argc, char **argv) {
    GError *error = NULL;
    g_autofree char *path = NULL, *job_path = NULL, *result = NULL;
    if (argc != 3)
        return 1;
    GDBusConnection *bus = g_dbus_connection_new_for_address_sync(
        argv[1], G_DBUS_CONNECTION_FLAGS_AUTHENTICATION_CLIENT | G_DBUS_CONNECTION_FLAGS_MESSAGE_BUS_CONNECTION, NULL, NULL,
        &error);
    check(error);
    JindiskManager *manager = jindisk_manager_proxy_new_sync(bus, 0, "org.jindisk1", "/org/jindisk1", NULL, &error);
    check(error);
    printf("version %s\n", jindisk_manager_get_version(manager));
    jindisk_manager_call_get_key_sync(manager, argv[2], &path, NULL, &error);
    check(error);
    JindiskKey *key = jindisk_key_proxy_new_sync(bus, 0, "org.jindisk1", path, NULL, &error);
    check(error);
    printf("state %s\n", jindisk_key_get_state(key));

    JindiskAudit *audit = jindisk_audit_proxy_new_sync(bus, 0, "org.jindisk1", "/org/jindisk1/audit", NULL, &error);
    check(error);
    last = jindisk_audit_get_last(audit);
    jindisk_audit_call_verify_sync(audit, none(), &job_path, NULL, &error);
    check(error);
    JindiskJob *job = jindisk_job_proxy_new_sync(bus, 0, "org.jindisk1", job_path, NULL, &error);
    check(error);
    while (g_strcmp0(jindisk_job_get_state(job), "succeeded") != 0)
        g_main_context_iteration(NULL, TRUE);
    jindisk_job_call_get_result_sync(job, none(), &result, NULL, &error);
    check(error);
    printf("verified %s\n", result);

    g_signal_connect(audit, "appended", G_CALLBACK(appended), NULL);
    loop = g_main_loop_new(NULL, FALSE);
    g_timeout_add_seconds(240, late, NULL);
    jindisk_key_call_revoke_sync(key, none(), NULL, &error);
    check(error);
    g_main_loop_run(loop);
    printf("was %" G_GUINT64_FORMAT "\n", last);
    jindisk_key_call_reinstate_sync(key, none(), NULL, &error);
    check(error);
    jindisk_manager_call_get_key_sync(manager, "nothing", &path, NULL, &error);
    check(error);
    return 0;
}
